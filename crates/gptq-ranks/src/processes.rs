//! Ranks that are processes, each connected with rank 0 by TCP.
//!
//! A thread for each connection reads what comes. Each side sends a sign of life every [`BEAT`], so that a rank that
//! hangs, or whose host is gone, is found by [`SILENCE`]; one that dies is found at once. Rank 0 passes on how a run
//! ended.

use std::io::ErrorKind;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::frame::{self, FrameKind};
use crate::mailbox::Mailbox;
use crate::{Cause, Collective, Ended, RankError, RankShare, host};

/// Time between signs of life.
const BEAT: Duration = Duration::from_secs(2);
/// Silence after which a rank counts as hanging.
pub(crate) const SILENCE: Duration = Duration::from_secs(15);

/// A connection with another rank.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) rank: usize,
    pub(crate) host: String,
    pub(crate) stream: TcpStream,
}

/// Writing end of a connection.
#[derive(Debug)]
struct Link {
    peer: usize,
    host: String,
    stream: Mutex<TcpStream>,
}

#[derive(Debug)]
struct Shared {
    share: RankShare,
    mailbox: Mailbox,
    links: Vec<Link>,
    closed: AtomicBool,
}

/// A rank that is a process of its own. One that is dropped before it leaves ends the run.
#[derive(Debug)]
pub struct Processes {
    shared: Arc<Shared>,
    left: AtomicBool,
}

impl Processes {
    /// Begins with the connections of a rank: of rank 0 with all others, of others with rank 0.
    pub(crate) fn new(share: RankShare, peers: Vec<Peer>) -> std::io::Result<Self> {
        let mut links = Vec::new();
        let mut readers = Vec::new();
        for Peer { rank, host, stream } in peers {
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(SILENCE))?;
            stream.set_write_timeout(Some(SILENCE))?;
            readers.push((links.len(), stream.try_clone()?));
            links.push(Link {
                peer: rank,
                host,
                stream: Mutex::new(stream),
            });
        }
        let shared = Arc::new(Shared {
            share,
            mailbox: Mailbox::new(share.size),
            links,
            closed: AtomicBool::new(false),
        });
        for (link, stream) in readers {
            let shared = shared.clone();
            thread::spawn(move || shared.read(link, stream));
        }
        let beating = shared.clone();
        thread::spawn(move || beating.beat());
        Ok(Processes {
            shared,
            left: AtomicBool::new(false),
        })
    }

    /// Returns its connections.
    #[cfg(test)]
    pub(crate) fn connections(&self) -> Vec<TcpStream> {
        let links = self.shared.links.iter();
        let stream = |link: &Link| link.stream.lock().unwrap().try_clone().unwrap();
        links.map(stream).collect()
    }

    /// Returns how the run ended, if another rank ended it.
    pub fn ended(&self) -> Option<Ended> {
        self.shared.mailbox.ended()
    }
}

impl Shared {
    /// Reads one connection to its end.
    fn read(&self, link: usize, mut stream: TcpStream) {
        let Link { peer, host, .. } = &self.links[link];
        loop {
            match frame::read(&mut stream) {
                Ok((FrameKind::Data, bytes)) => self.mailbox.put(*peer, bytes),
                Ok((FrameKind::Beat, _)) => {}
                Ok((FrameKind::Leave, _)) => self.mailbox.leave(*peer),
                Ok((FrameKind::End, bytes)) => {
                    // Whoever connected has proven that it speaks as ranks do; a line that does not parse is kept.
                    let ended = serde_json::from_slice(&bytes).unwrap_or_else(|_| Ended {
                        rank: *peer,
                        host: host.clone(),
                        cause: Cause::Failed("it ended the run".to_owned()),
                    });
                    return self.pass_on(ended);
                }
                Err(_) if self.closed.load(Ordering::Relaxed) || self.mailbox.has_left(*peer) => {
                    return;
                }
                Err(error) => {
                    let cause = match error.kind() {
                        ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                            format!(
                                "it hangs, or its host is gone: no sign of life for {} s",
                                SILENCE.as_secs()
                            )
                        }
                        _ => {
                            "it is gone: killed, perhaps for want of memory, or cut off".to_owned()
                        }
                    };
                    return self.pass_on(Ended {
                        rank: *peer,
                        host: host.clone(),
                        cause: Cause::Failed(cause),
                    });
                }
            }
        }
    }

    /// Takes in how the run ended, and tells the others if this is rank 0.
    fn pass_on(&self, ended: Ended) {
        if self.mailbox.ended().is_some() {
            return;
        }
        self.mailbox.end(ended.clone());
        if self.share.rank == 0 {
            self.tell(&ended);
        }
    }

    /// Tells everyone on a connection how the run ended.
    fn tell(&self, ended: &Ended) {
        let text = serde_json::to_vec(ended).unwrap_or_default();
        // The one that ended it knows, or takes nothing any more.
        for link in self.links.iter().filter(|link| link.peer != ended.rank) {
            // Who does not take it in time finds the connection closed.
            let _ = self.write(link, FrameKind::End, &text);
        }
    }

    fn write(&self, link: &Link, kind: FrameKind, bytes: &[u8]) -> std::io::Result<()> {
        let mut stream = link.stream.lock().unwrap_or_else(PoisonError::into_inner);
        frame::write(&mut *stream, kind, bytes)
    }

    /// Gives signs of life until the run is over.
    fn beat(&self) {
        while !self.closed.load(Ordering::Relaxed) && self.mailbox.ended().is_none() {
            for link in &self.links {
                // Whoever reads the connection finds out what is wrong with it.
                let _ = self.write(link, FrameKind::Beat, &[]);
            }
            thread::sleep(BEAT);
        }
    }
}

impl Collective for Processes {
    fn share(&self) -> RankShare {
        self.shared.share
    }

    fn send(&self, to: usize, bytes: Vec<u8>) -> Result<(), RankError> {
        self.check()?;
        let link = self.shared.links.iter().find(|link| link.peer == to);
        let link = link.expect("one of the two is rank 0");
        match self.shared.write(link, FrameKind::Data, &bytes) {
            Ok(()) => Ok(()),
            Err(_) => {
                self.shared.pass_on(Ended {
                    rank: to,
                    host: link.host.clone(),
                    cause: Cause::Failed(
                        "it takes nothing any more: it is gone, or hangs".to_owned(),
                    ),
                });
                self.check()
            }
        }
    }

    fn receive(&self, from: usize) -> Result<Vec<u8>, RankError> {
        self.shared.mailbox.take(from)
    }

    fn check(&self) -> Result<(), RankError> {
        self.shared.mailbox.check()
    }

    fn end(&self, cause: Cause) {
        self.left.store(true, Ordering::Relaxed);
        let ended = Ended {
            rank: self.shared.share.rank,
            host: host(),
            cause,
        };
        // What ended on another rank is known there.
        if self.shared.mailbox.ended().is_none() {
            self.shared.mailbox.end(ended.clone());
            self.shared.tell(&ended);
        }
    }

    fn leave(&self) -> Result<(), RankError> {
        self.left.store(true, Ordering::Relaxed);
        let RankShare { rank, size } = self.share();
        let others = if rank == 0 { 1..size } else { 0..1 };
        // Rank 0 leaves last: it tells the others that all went well.
        if rank == 0 {
            self.shared.mailbox.wait_left(others.clone())?;
        }
        for link in &self.shared.links {
            let _ = self.shared.write(link, FrameKind::Leave, &[]);
        }
        self.shared.mailbox.wait_left(others)
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        if !self.left.load(Ordering::Relaxed) {
            self.end(Cause::Failed("it ended without a word".to_owned()));
        }
        self.shared.closed.store(true, Ordering::Relaxed);
        for link in &self.shared.links {
            let stream = link.stream.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = stream.shutdown(Shutdown::Write);
        }
    }
}
