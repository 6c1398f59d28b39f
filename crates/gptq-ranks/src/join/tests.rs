//! Ranks on the loopback: those that come, those that do not, and strangers.

use std::io::Write;
use std::net::Ipv4Addr;

use super::*;
use crate::{Collective, Launcher};

/// A port that was free a moment ago.
fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    listener.local_addr().unwrap().port()
}

fn launch(rank: usize, size: usize, port: u16) -> RankLaunch {
    RankLaunch {
        launcher: Launcher::Torchrun,
        rank,
        size,
        local_rank: rank,
        address: "127.0.0.1".to_owned(),
        ports: vec![port],
        run: "a".to_owned(),
    }
}

fn within(launch: &RankLaunch, seconds: u64) -> Result<Processes, RankError> {
    noting(launch, seconds, &mut |_| {})
}

fn noting(
    launch: &RankLaunch,
    seconds: u64,
    on_stranger: &mut dyn FnMut(&str),
) -> Result<Processes, RankError> {
    let options = JoinOptions {
        within: Duration::from_secs(seconds),
        on_stranger,
        check: &mut || false,
    };
    join(launch, options)
}

/// Joins all ranks of a run, each on a thread.
fn all(size: usize) -> Vec<Processes> {
    let port = free_port();
    thread::scope(|scope| {
        let ranks =
            (0..size).map(|rank| scope.spawn(move || within(&launch(rank, size, port), 20)));
        let ranks: Vec<_> = ranks.collect();
        ranks
            .into_iter()
            .map(|it| it.join().unwrap().unwrap())
            .collect()
    })
}

#[test]
fn ranks_meet_in_any_order_and_tell_each_other_what_they_have() {
    for size in [2, 4, 8] {
        let ranks = all(size);
        thread::scope(|scope| {
            for rank in &ranks {
                scope.spawn(move || {
                    let own = rank.share().rank;
                    // More than a socket's buffers hold.
                    let gathered = rank.all_gather(vec![own as u8; 3_000_000]).unwrap();
                    let expected = (0..size).map(|it| vec![it as u8; 3_000_000]);
                    assert!(gathered.into_iter().eq(expected));
                    let sum = rank.sum(Some(vec![own as f32, 1.0])).unwrap().unwrap();
                    let ranks = size as f32;
                    assert_eq!(sum, [ranks * (ranks - 1.0) / 2.0, ranks]);
                    rank.leave().unwrap();
                });
            }
        });
    }
}

#[test]
fn a_missing_rank_is_named_on_every_rank_that_came() {
    let port = free_port();
    let [root, other] = thread::scope(|scope| {
        let root = scope.spawn(|| within(&launch(0, 4, port), 1).unwrap_err().to_string());
        let other = scope.spawn(|| {
            let joined = within(&launch(2, 4, port), 20).unwrap();
            joined.receive(0).unwrap_err().to_string()
        });
        [root, other].map(|it| it.join().unwrap())
    });
    let line = format!("ranks 1, 3 of 4 did not come to rank 0 at 127.0.0.1:{port} within 1 s");
    assert_eq!(root, line);
    assert!(
        other.starts_with("rank 0 on ") && other.ends_with(&line),
        "{other}"
    );
}

#[test]
fn a_rank_without_rank_0_says_where_it_looked() {
    let port = free_port();
    let error = within(&launch(1, 2, port), 1).unwrap_err().to_string();
    let start = format!("rank 1: rank 0 does not answer at 127.0.0.1:{port} (");
    assert!(
        error.starts_with(&start) && error.ends_with("within 1 s"),
        "{error}"
    );
}

#[test]
fn ranks_that_count_differently_end_each_other() {
    let port = free_port();
    let [root, other] = thread::scope(|scope| {
        let root = scope.spawn(|| within(&launch(0, 2, port), 20).unwrap_err().to_string());
        let other = scope.spawn(|| within(&launch(1, 4, port), 20).unwrap_err().to_string());
        [root, other].map(|it| it.join().unwrap())
    });
    assert_eq!(root, other);
    assert!(
        root.contains("counts 4 ranks, and rank 0 counts 2"),
        "{root}"
    );
}

#[test]
fn strangers_are_refused_and_do_not_keep_ranks_away() {
    let port = free_port();
    let mut refused = Vec::new();
    let root = thread::scope(|scope| {
        let strangers = scope.spawn(move || {
            let connect = || loop {
                if let Ok(stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) {
                    return stream;
                }
            };
            // One that speaks another language, one that says nothing, and a rank of another run.
            connect().write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
            let silent = connect();
            let other = RankLaunch {
                run: "b".to_owned(),
                ..launch(1, 2, port)
            };
            let refused = within(&other, 20).unwrap_err().to_string();
            assert!(refused.contains("belongs to run \"b\""), "{refused}");
            // Only now comes the rank itself, and once it is there nobody else can be it.
            let own = within(&launch(1, 2, port), 20).unwrap();
            (silent, own)
        });
        let root = noting(&launch(0, 2, port), 20, &mut |line| {
            refused.push(line.to_owned())
        })
        .unwrap();
        strangers.join().unwrap();
        root
    });
    assert_eq!(root.share().size, 2);
    assert!(
        refused.iter().any(|it| it.contains("no rank")),
        "{refused:?}"
    );
    assert!(
        refused
            .iter()
            .any(|it| it.contains("two runs use one port")),
        "{refused:?}"
    );
}

#[test]
fn a_rank_that_is_there_twice_is_refused() {
    let port = free_port();
    thread::scope(|scope| {
        let root = scope.spawn(|| within(&launch(0, 4, port), 3).unwrap_err().to_string());
        let first = within(&launch(1, 4, port), 20).unwrap();
        let second = within(&launch(1, 4, port), 20).unwrap_err().to_string();
        assert!(second.contains("is there already"), "{second}");
        assert!(first.receive(0).is_err());
        assert!(root.join().unwrap().starts_with("ranks 2, 3 of 4"));
    });
}

#[test]
fn a_port_that_another_run_has_is_named() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let error = within(&launch(0, 2, port), 5).unwrap_err().to_string();
    let start = format!("rank 0 cannot listen at 127.0.0.1:{port}: ");
    assert!(
        error.starts_with(&start) && error.contains("MASTER_PORT"),
        "{error}"
    );
}

#[test]
fn with_several_ports_rank_0_takes_a_free_one_and_is_found() {
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let ports = vec![taken.local_addr().unwrap().port(), free_port()];
    let launch = |rank| RankLaunch {
        ports: ports.clone(),
        ..launch(rank, 2, 0)
    };
    let [root, other] = [launch(0), launch(1)];
    // Whoever has the first port closes what connects.
    thread::spawn(move || taken.incoming().for_each(drop));
    thread::scope(|scope| {
        let root = scope.spawn(move || within(&root, 20).unwrap());
        let other = within(&other, 20).unwrap();
        let root = root.join().unwrap();
        root.send(1, vec![5]).unwrap();
        assert_eq!(other.receive(0).unwrap(), [5]);
    });
}

#[test]
fn a_rank_that_dies_ends_the_others_through_rank_0() {
    let mut ranks = all(4);
    let dying = ranks.remove(2);
    // As the system closes what a killed process had open.
    for link in dying.connections() {
        link.shutdown(std::net::Shutdown::Both).unwrap();
    }
    for rank in &ranks {
        let from = if rank.is_root() { 3 } else { 0 };
        let error = rank.receive(from).unwrap_err().to_string();
        assert!(
            error.starts_with("rank 2 on ") && error.contains("it is gone"),
            "{error}"
        );
    }
}

#[test]
fn rank_0_dying_ends_the_others() {
    let mut ranks = all(2);
    let root = ranks.remove(0);
    for link in root.connections() {
        link.shutdown(std::net::Shutdown::Both).unwrap();
    }
    let error = ranks[0].receive(0).unwrap_err().to_string();
    assert!(error.starts_with("rank 0 on "), "{error}");
}

#[test]
fn an_error_of_one_rank_reaches_all_as_it_was() {
    for failing in [0, 1, 3] {
        let ranks = all(4);
        ranks[failing].end(Cause::Failed("disk full".to_owned()));
        for rank in &ranks {
            let from = if rank.is_root() { 2 } else { 0 };
            let error = rank.receive(from).unwrap_err().to_string();
            assert_eq!(error, format!("rank {failing} on {}: disk full", host()));
        }
    }
}
