//! Matrices between ranks that share a device, as messages.

use gptq_kernels::{DeviceLink, Engine, LinkError, Parcel, ParcelKind, Shipment};
use gptq_ranks::{Collective, RankError};

/// A way by the host; its ranks are threads, of which any two can send to each other.
pub(crate) struct HostLink<'a, B: Engine> {
    ranks: &'a dyn Collective,
    device: &'a B::Device,
}

impl<'a, B: Engine> HostLink<'a, B> {
    /// Begins with a rank and its device.
    pub(crate) fn new(ranks: &'a dyn Collective, device: &'a B::Device) -> Self {
        HostLink { ranks, device }
    }
}

impl<B: Engine> DeviceLink<B> for HostLink<'_, B> {
    fn exchange(
        &self,
        sent: Shipment<Parcel<B>>,
        expected: &[(usize, ParcelKind)],
    ) -> Result<Vec<Parcel<B>>, LinkError> {
        let failed = |error: RankError| match error {
            RankError::Ended(_) => LinkError::Ended,
            error => LinkError::Failed(error.to_string()),
        };
        for (to, parcel) in sent {
            let bytes = parcel.into_data().as_bytes().to_vec();
            self.ranks.send(to, bytes).map_err(failed)?;
        }
        let arrived = expected.iter().map(|&(from, kind)| {
            let bytes = self.ranks.receive(from).map_err(failed)?;
            let found = bytes.len();
            Parcel::of_bytes(bytes, kind, self.device).ok_or_else(|| {
                let wanted = kind.bytes();
                failed(RankError::Length {
                    from,
                    found,
                    wanted,
                })
            })
        });
        arrived.collect()
    }

    /// Does nothing: what waits for a message fails once the run has ended.
    fn abort(&self) {}
}
