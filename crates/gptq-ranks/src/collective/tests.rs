//! Ranks that are threads.

use std::thread;

use super::*;
use crate::{Ended, LANES, OneRank, Threads};

/// Runs `work` on as many threads, each a rank; results come in order of ranks.
fn on_ranks<T: Send>(size: usize, work: impl Fn(&Threads) -> T + Sync) -> Vec<T> {
    let ranks = Threads::ranks(size).unwrap();
    thread::scope(|scope| {
        let ranks = ranks.into_iter().map(|rank| {
            scope.spawn(|| {
                let rank = rank;
                let done = work(&rank);
                let _ = rank.leave();
                done
            })
        });
        let ranks: Vec<_> = ranks.collect();
        ranks.into_iter().map(|it| it.join().unwrap()).collect()
    })
}

fn lane(lane: usize) -> Vec<f32> {
    (0..50).map(|at| 1.0 / (3 * lane + at + 1) as f32).collect()
}

fn add(mut a: Vec<f32>, b: Vec<f32>) -> Vec<f32> {
    a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
    a
}

#[test]
fn sums_are_the_same_bits_on_every_rank_of_any_number() {
    let alone = |rank: &dyn Collective| {
        let lanes = rank
            .share()
            .lanes()
            .map(|it| Some(lane(it)).filter(|_| it != 6));
        let own = tree(lanes.collect(), &mut add);
        rank.sum(own).unwrap()
    };
    let one = alone(&OneRank);
    for size in [1, 2, 4, LANES] {
        let sums = on_ranks(size, |rank| alone(rank));
        assert_eq!(sums, vec![one.clone(); size]);
    }
}

#[test]
fn what_is_gathered_comes_in_order_of_ranks() {
    let all = on_ranks(4, |rank| {
        let own = vec![rank.share().rank as u8; rank.share().rank];
        let all = rank.all_gather(own.clone()).unwrap();
        let root = rank.gather(own).unwrap();
        assert_eq!(root.len(), if rank.is_root() { 4 } else { 0 });
        let told = rank.broadcast(vec![rank.share().rank as u8 + 7]).unwrap();
        (all, told)
    });
    let expected = (vec![vec![], vec![1], vec![2; 2], vec![3; 3]], vec![7]);
    assert_eq!(all, vec![expected; 4]);
}

#[test]
fn sums_of_different_lengths_are_refused() {
    let errors = on_ranks(2, |rank| {
        let sum = rank.sum(Some(vec![0.0; rank.share().rank + 1]));
        let error = sum.unwrap_err().to_string();
        rank.end(Cause::Failed(error.clone()));
        error
    });
    assert_eq!(errors[0], "rank 1 sent 8 bytes where 4 are due");
}

#[test]
fn a_rank_that_fails_ends_the_wait_of_all_others() {
    let errors = on_ranks(4, |rank| {
        if rank.share().rank == 2 {
            rank.end(Cause::Failed("no memory".to_owned()));
        }
        rank.all_gather(vec![1]).unwrap_err()
    });
    for error in errors {
        let RankError::Ended(Ended { rank: 2, cause, .. }) = error else {
            panic!("{error}");
        };
        assert_eq!(cause, Cause::Failed("no memory".to_owned()));
    }
}

#[test]
fn a_rank_that_panics_ends_the_others() {
    let ranks = Threads::ranks(2).unwrap();
    let [first, second] = <[Threads; 2]>::try_from(ranks).unwrap();
    let panicked = thread::spawn(move || {
        let _own = second;
        std::panic::resume_unwind(Box::new("out of order"));
    });
    let error = first.receive(1).unwrap_err().to_string();
    assert!(error.starts_with("rank 1 on "), "{error}");
    assert!(panicked.join().is_err());
}

#[test]
fn ranks_leave_together() {
    let ranks = Threads::ranks(4).unwrap();
    thread::scope(|scope| {
        for rank in &ranks {
            scope.spawn(|| rank.leave().unwrap());
        }
    });
    for size in [0, 3, 6, 16] {
        assert!(Threads::ranks(size).is_err(), "{size}");
    }
}
