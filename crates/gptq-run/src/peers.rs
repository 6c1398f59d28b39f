//! The ranks of a run with the way between their devices: matrices go there, messages by the ranks' own transport.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{scope, sleep};
use std::time::Duration;

use gptq_kernels::{DeviceLink, Engine, LinkError, Parcel, ParcelKind, Shipment};
use gptq_ranks::{Collective, host};

use crate::RunError;
use crate::agreement::told;
use crate::host_link::HostLink;
use crate::profile::{RankTimes, TimedLink};

/// Time between looks at whether the run has ended on another rank.
const LOOK: Duration = Duration::from_millis(100);

/// Way of matrices from one rank to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MatrixPath {
    /// From device to device, where an engine has [`Engine::LINKS`]; else they are messages as all others.
    Devices,
    /// From device to device by way of the host: ranks that share a device have no other.
    Host,
}

/// The other ranks, as one of them sees them.
pub(crate) struct Peers<'a, B: Engine> {
    pub(crate) ranks: &'a dyn Collective,
    /// The way between devices; none where matrices are messages as all others.
    pub(crate) link: Option<&'a dyn DeviceLink<B>>,
}

impl<B: Engine> Clone for Peers<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Engine> Copy for Peers<'_, B> {}

impl<'a, B: Engine> Deref for Peers<'a, B> {
    type Target = dyn Collective + 'a;

    fn deref(&self) -> &Self::Target {
        self.ranks
    }
}

impl<'a, B: Engine> Peers<'a, B> {
    /// Returns ranks whose matrices are messages.
    pub(crate) fn by_messages(ranks: &'a dyn Collective) -> Self {
        Peers { ranks, link: None }
    }

    /// Exchanges matrices by `link`; see [`DeviceLink::exchange`].
    ///
    /// # Errors
    /// The end of the run on another rank, or a failure of the link.
    pub(crate) fn exchange(
        &self,
        link: &dyn DeviceLink<B>,
        sent: Shipment<Parcel<B>>,
        expected: &[(usize, ParcelKind)],
    ) -> Result<Vec<Parcel<B>>, RunError> {
        self.ranks.check()?;
        link.exchange(sent, expected)
            .map_err(|error| why(error, self.ranks))
    }
}

/// Says why a link failed: an exchange that was ended, was so for another rank's sake.
fn why(error: LinkError, ranks: &dyn Collective) -> RunError {
    match ranks.check() {
        Err(ended) if error == LinkError::Ended => ended.into(),
        _ => RunError::Link(error),
    }
}

/// Connects a rank's device with those of the others; `None` for a single rank, and where matrices are messages.
///
/// # Errors
/// A missing library, two ranks with one device, ranks that do not come, and the library's own failures.
fn connect<'a, B: Engine>(
    device: &'a B::Device,
    path: MatrixPath,
    ranks: &'a dyn Collective,
) -> Result<Option<Box<dyn DeviceLink<B> + 'a>>, RunError> {
    let share = ranks.share();
    match path {
        _ if share.size == 1 => return Ok(None),
        MatrixPath::Host => return Ok(Some(Box::new(HostLink::<B>::new(ranks, device)))),
        MatrixPath::Devices if !B::LINKS => return Ok(None),
        MatrixPath::Devices => {}
    }
    let own = (host(), B::device_id(device).unwrap_or_default());
    let own = serde_json::to_vec(&own).expect("plain values always serialize");
    let mut owners = BTreeMap::new();
    for (rank, device) in ranks.all_gather(own)?.into_iter().enumerate() {
        if let Some(first) = owners.insert(device, rank) {
            return Err(RunError::SharedDevice {
                ranks: [first, rank],
                host: host(),
            });
        }
    }
    let ticket = match ranks.is_root() {
        true => B::link_ticket().map_err(RunError::Link)?,
        false => Vec::new(),
    };
    let ticket: Vec<u8> = told(ranks, ticket)?;
    let place = [share.rank, share.size];
    let linked = B::connect(device, &ticket, place, &|| ranks.check().is_err());
    Ok(Some(linked.map_err(|error| why(error, ranks))?))
}

/// Does `work` with the ranks' devices connected. The link ends with the run on another rank, since the device may wait
/// for a matrix that does not come, and with an error of the work's own.
///
/// # Errors
/// Those of [`connect`] and of the work.
pub(crate) fn connected<B: Engine, T>(
    device: &B::Device,
    path: MatrixPath,
    ranks: &dyn Collective,
    (times, waits): (Arc<RankTimes>, bool),
    work: impl FnOnce(Peers<'_, B>) -> Result<T, RunError>,
) -> Result<T, RunError> {
    let Some(link) = connect::<B>(device, path, ranks)? else {
        return work(Peers::by_messages(ranks));
    };
    let link = TimedLink {
        link: &*link,
        times,
        waits: waits.then_some(device),
    };
    let over = AtomicBool::new(false);
    scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Acquire) {
                if ranks.check().is_err() {
                    return link.abort();
                }
                sleep(LOOK);
            }
        });
        let _watched = Watched(&over);
        let link = Some(&link as &dyn DeviceLink<B>);
        let done = work(Peers { ranks, link });
        if let (Err(_), Some(link)) = (&done, link) {
            link.abort();
        }
        done
    })
}

/// Ends the watch when it is dropped, also by unwinding.
struct Watched<'a>(&'a AtomicBool);

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}
