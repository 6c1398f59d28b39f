//! Exchange of matrices between the devices of a run's ranks.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData};
use thiserror::Error;

/// A matrix that goes from one rank to another.
#[derive(Clone, Debug)]
pub enum Parcel<B: Backend> {
    /// Floats.
    Float(Tensor<B, 2>),
    /// Integers.
    Int(Tensor<B, 2, Int>),
}

/// Shape and element type of a matrix that is to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParcelKind {
    /// Rows and columns.
    pub shape: [usize; 2],
    /// Element type.
    pub dtype: DType,
}

/// Reasons that matrices do not arrive.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LinkError {
    /// The exchange was ended by [`DeviceLink::abort`].
    #[error("the exchange between devices was ended")]
    Ended,
    /// The library between the devices failed.
    #[error("{0}")]
    Failed(String),
}

/// Matrices on their way, each with the rank that it comes from or goes to.
pub type Shipment<T> = Vec<(usize, T)>;

/// The way from a rank's device to those of the other ranks.
pub trait DeviceLink<B: Backend>: Send + Sync {
    /// Sends matrices to other ranks and receives others from them, all at once; those received come in the order of
    /// `expected`. Of two ranks, both name what goes from one to the other in the same order.
    ///
    /// # Errors
    /// A run that ended on another rank, or a failure of the library.
    fn exchange(
        &self,
        sent: Shipment<Parcel<B>>,
        expected: &[(usize, ParcelKind)],
    ) -> Result<Vec<Parcel<B>>, LinkError>;

    /// Ends what is under way and whatever comes after, from any thread.
    fn abort(&self);
}

impl<B: Backend> Parcel<B> {
    /// Returns its shape and element type.
    pub fn kind(&self) -> ParcelKind {
        let (shape, dtype) = match self {
            Parcel::Float(tensor) => (tensor.dims(), tensor.dtype()),
            Parcel::Int(tensor) => (tensor.dims(), tensor.dtype()),
        };
        ParcelKind { shape, dtype }
    }

    /// Returns the floats.
    ///
    /// # Panics
    /// It holds integers.
    pub fn float(self) -> Tensor<B, 2> {
        match self {
            Parcel::Float(tensor) => tensor,
            Parcel::Int(_) => panic!("a parcel of integers where floats are due"),
        }
    }

    /// Returns the integers.
    ///
    /// # Panics
    /// It holds floats.
    pub fn int(self) -> Tensor<B, 2, Int> {
        match self {
            Parcel::Int(tensor) => tensor,
            Parcel::Float(_) => panic!("a parcel of floats where integers are due"),
        }
    }

    /// Copies it to the host; waits for the device.
    pub fn into_data(self) -> TensorData {
        match self {
            Parcel::Float(tensor) => tensor.into_data(),
            Parcel::Int(tensor) => tensor.into_data(),
        }
    }

    /// Puts the bytes of a matrix of this kind on a device; `None` if there are more or fewer than it has.
    pub fn of_bytes(bytes: Vec<u8>, kind: ParcelKind, device: &B::Device) -> Option<Self> {
        let ParcelKind { shape, dtype } = kind;
        if bytes.len() != kind.bytes() {
            return None;
        }
        let data = TensorData::from_bytes_vec(bytes, shape, dtype);
        Some(match dtype.is_float() {
            true => Parcel::Float(Tensor::from_data(data, (device, dtype))),
            false => Parcel::Int(Tensor::from_data(data, (device, dtype))),
        })
    }
}

impl ParcelKind {
    /// Returns its number of bytes.
    pub fn bytes(self) -> usize {
        self.shape[0] * self.shape[1] * self.dtype.size()
    }
}

impl<B: Backend> From<Tensor<B, 2>> for Parcel<B> {
    fn from(tensor: Tensor<B, 2>) -> Self {
        Parcel::Float(tensor)
    }
}

impl<B: Backend> From<Tensor<B, 2, Int>> for Parcel<B> {
    fn from(tensor: Tensor<B, 2, Int>) -> Self {
        Parcel::Int(tensor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cpu;

    #[test]
    fn parcels_come_back_from_their_bytes() {
        let device = Default::default();
        let values = TensorData::new(vec![1.5f32, -2.0, 0.0, 7.0, 1e9, -0.5], [2, 3]);
        let parcel = Parcel::Float(Tensor::<Cpu, 2>::from_data(
            values.clone(),
            (&device, DType::F32),
        ));
        let kind = parcel.kind();
        assert_eq!(
            (kind.shape, kind.dtype, kind.bytes()),
            ([2, 3], DType::F32, 24)
        );
        let bytes = parcel.into_data().as_bytes().to_vec();
        let back = Parcel::<Cpu>::of_bytes(bytes.clone(), kind, &device).unwrap();
        assert_eq!(back.float().into_data(), values);
        assert!(Parcel::<Cpu>::of_bytes(bytes[1..].to_vec(), kind, &device).is_none());

        let codes = TensorData::new(vec![0u8, 15, 3, 9], [2, 2]);
        let parcel = Parcel::Int(Tensor::<Cpu, 2, Int>::from_data(
            codes.clone(),
            (&device, DType::U8),
        ));
        let kind = parcel.kind();
        let bytes = parcel.into_data().as_bytes().to_vec();
        let back = Parcel::<Cpu>::of_bytes(bytes, kind, &device).unwrap();
        assert_eq!(back.int().into_data(), codes);
    }
}
