//! Bootstrap of a run's ranks: rank 0 listens, the others connect and say who they are.
//!
//! A connection that says nothing a rank would say is dropped, and so is one that belongs to another run; rank 0 goes on
//! waiting. Ranks of one run that do not agree on their number end it.

use std::io::{self, Read};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::frame::{self, FrameKind};
use crate::processes::{Peer, Processes};
use crate::{Cause, Ended, RankError, RankLaunch, RankShare, host};

/// Time within which a connection is to say who it is, and rank 0 to answer.
const MANNERS: Duration = Duration::from_secs(5);
/// Time between looks.
const LOOK: Duration = Duration::from_millis(50);

/// Settings of [`join`].
pub struct JoinOptions<'a> {
    /// Time within which all ranks are to be there.
    pub within: Duration,
    /// Is told of connections that are no ranks of the run.
    pub on_stranger: &'a mut dyn FnMut(&str),
    /// Ends the wait once it returns true.
    pub check: &'a mut dyn FnMut() -> bool,
}

/// Greeting of a rank.
#[derive(Debug, Serialize, Deserialize)]
struct Hello {
    run: String,
    rank: usize,
    size: usize,
    host: String,
}

/// Answer of rank 0.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Welcome { host: String },
    Refused(String),
}

/// Brings this process together with the other ranks of its run.
///
/// # Errors
/// A port that is taken, ranks that do not come in time, or that do not agree on their number, and `check`.
pub fn join(launch: &RankLaunch, options: JoinOptions<'_>) -> Result<Processes, RankError> {
    let share = RankShare {
        rank: launch.rank,
        size: launch.size,
    };
    let peers = match launch.rank {
        0 => listen(launch, options)?,
        _ => vec![connect(launch, options)?],
    };
    Processes::new(share, peers)
        .map_err(|error| RankError::Refused(format!("rank {}: {error}", launch.rank)))
}

/// Rank 0's address, as it is named.
fn place(launch: &RankLaunch) -> String {
    match &launch.ports[..] {
        [port] => format!("{}:{port}", launch.address),
        ports => format!("{}:{}-{}", launch.address, ports[0], ports[ports.len() - 1]),
    }
}

fn addresses(launch: &RankLaunch, port: u16) -> io::Result<Vec<SocketAddr>> {
    Ok((launch.address.as_str(), port).to_socket_addrs()?.collect())
}

/// Waits for all others on behalf of rank 0.
fn listen(launch: &RankLaunch, options: JoinOptions<'_>) -> Result<Vec<Peer>, RankError> {
    let deadline = Instant::now() + options.within;
    let listener = bind(launch)?;
    let (sender, arrivals) = channel();
    let mut peers: Vec<Peer> = Vec::new();
    let missing = |peers: &[Peer]| {
        let there = |rank: &usize| peers.iter().all(|peer| peer.rank != *rank);
        let missing = (1..launch.size).filter(there);
        missing.map(|rank| rank.to_string()).collect::<Vec<_>>()
    };
    let failed = loop {
        if peers.len() + 1 == launch.size {
            peers.sort_by_key(|peer| peer.rank);
            return Ok(peers);
        }
        while let Ok((stream, _)) = listener.accept() {
            let sender = sender.clone();
            thread::spawn(move || hear(stream, sender));
        }
        for (stream, hello) in arrivals.try_iter() {
            let Some(hello) = hello else {
                (options.on_stranger)("a connection that is no rank was refused");
                continue;
            };
            match admit(launch, &peers, &hello) {
                Admission::Welcome => {
                    if frame::greet(&mut &stream, &Answer::Welcome { host: host() }).is_ok() {
                        let Hello { rank, host, .. } = hello;
                        peers.push(Peer { rank, host, stream });
                    }
                }
                Admission::Stranger(why) => {
                    (options.on_stranger)(&why);
                    let _ = frame::greet(&mut &stream, &Answer::Refused(why));
                }
                Admission::Disagrees(why) => {
                    let _ = frame::greet(&mut &stream, &Answer::Refused(why.clone()));
                    return Err(give_up(peers, RankError::Refused(why)));
                }
            }
        }
        if (options.check)() {
            break RankError::Ended(Ended {
                rank: 0,
                host: host(),
                cause: Cause::Stopped,
            });
        }
        if Instant::now() > deadline {
            let missing = missing(&peers);
            break RankError::Missing {
                ranks: format!(
                    "rank{} {}",
                    if missing.len() > 1 { "s" } else { "" },
                    missing.join(", ")
                ),
                size: launch.size,
                address: place(launch),
                seconds: options.within.as_secs(),
            };
        }
        thread::sleep(LOOK);
    };
    Err(give_up(peers, failed))
}

/// Tells those who are there why the run does not begin.
fn give_up(peers: Vec<Peer>, error: RankError) -> RankError {
    let ended = match &error {
        RankError::Ended(ended) => ended.clone(),
        error => Ended {
            rank: 0,
            host: host(),
            cause: Cause::Failed(error.to_string()),
        },
    };
    let text = serde_json::to_vec(&ended).unwrap_or_default();
    for mut peer in peers {
        let _ = frame::write(&mut peer.stream, FrameKind::End, &text);
        drain(peer.stream);
    }
    error
}

/// Ends a connection so that the other side hears the last of it: what closes with unread bytes takes back what it sent.
fn drain(mut stream: TcpStream) {
    let deadline = Instant::now() + MANNERS;
    let mut ended = stream
        .shutdown(Shutdown::Write)
        .and_then(|()| stream.set_read_timeout(Some(MANNERS)));
    while ended.is_ok() && Instant::now() < deadline {
        ended = match stream.read(&mut [0; 256]) {
            Ok(0) => return,
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        };
    }
}

fn bind(launch: &RankLaunch) -> Result<TcpListener, RankError> {
    let mut last = None;
    for &port in &launch.ports {
        let bound = addresses(launch, port).and_then(|all| TcpListener::bind(&all[..]));
        match bound.and_then(|it| it.set_nonblocking(true).map(|()| it)) {
            Ok(listener) => return Ok(listener),
            Err(error) => last = Some(error),
        }
    }
    Err(RankError::Listen {
        address: place(launch),
        reason: last.map_or_else(String::new, |error| error.to_string()),
    })
}

/// Hears who a connection is.
fn hear(stream: TcpStream, arrivals: Sender<(TcpStream, Option<Hello>)>) {
    // An accepted connection may inherit that its listener does not wait.
    let manners = stream
        .set_nonblocking(false)
        .and_then(|()| stream.set_read_timeout(Some(MANNERS)));
    let hello = manners.and_then(|()| frame::greeting(&mut &stream));
    let _ = arrivals.send((stream, hello.ok()));
}

enum Admission {
    Welcome,
    Stranger(String),
    Disagrees(String),
}

fn admit(launch: &RankLaunch, peers: &[Peer], hello: &Hello) -> Admission {
    let Hello {
        run,
        rank,
        size,
        host,
    } = hello;
    if *run != launch.run {
        return Admission::Stranger(format!(
            "rank {rank} on {host} belongs to run {run:?}, and rank 0 to {:?}: two runs use one port",
            launch.run
        ));
    }
    if *size != launch.size || *rank >= launch.size {
        return Admission::Disagrees(format!(
            "rank {rank} on {host} counts {size} ranks, and rank 0 counts {}; start all with one number",
            launch.size
        ));
    }
    match peers.iter().find(|peer| peer.rank == *rank) {
        Some(peer) => Admission::Stranger(format!(
            "rank {rank} on {host} is there already, on {}; give each process a rank of its own",
            peer.host
        )),
        None if *rank == 0 => Admission::Stranger(format!("a second rank 0 on {host}")),
        None => Admission::Welcome,
    }
}

/// Connects with rank 0.
fn connect(launch: &RankLaunch, options: JoinOptions<'_>) -> Result<Peer, RankError> {
    let deadline = Instant::now() + options.within;
    let hello = Hello {
        run: launch.run.clone(),
        rank: launch.rank,
        size: launch.size,
        host: host(),
    };
    let mut reason = "nothing listens there".to_owned();
    loop {
        for &port in &launch.ports {
            match meet(launch, port, &hello) {
                Ok((stream, Answer::Welcome { host })) => {
                    return Ok(Peer {
                        rank: 0,
                        host,
                        stream,
                    });
                }
                // Another run's rank 0 may have the first of several ports.
                Ok((_, Answer::Refused(why))) if launch.ports.len() == 1 => {
                    return Err(RankError::Refused(why));
                }
                Ok((_, Answer::Refused(why))) => reason = why,
                Err(error) => reason = error.to_string(),
            }
        }
        if (options.check)() {
            return Err(RankError::Ended(Ended {
                rank: launch.rank,
                host: host(),
                cause: Cause::Stopped,
            }));
        }
        if Instant::now() > deadline {
            return Err(RankError::NoAnswer {
                rank: launch.rank,
                address: place(launch),
                reason,
                seconds: options.within.as_secs(),
            });
        }
        thread::sleep(LOOK);
    }
}

fn meet(launch: &RankLaunch, port: u16, hello: &Hello) -> io::Result<(TcpStream, Answer)> {
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in addresses(launch, port)? {
        match TcpStream::connect_timeout(&address, MANNERS) {
            Ok(stream) => {
                stream.set_read_timeout(Some(MANNERS))?;
                frame::greet(&mut &stream, hello)?;
                let answer = frame::greeting(&mut &stream)?;
                return Ok((stream, answer));
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests;
