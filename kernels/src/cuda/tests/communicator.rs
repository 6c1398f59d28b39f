//! NCCL on a communicator of one rank, which sends to itself.

use std::sync::mpsc::channel;
use std::thread::spawn;
use std::time::Duration;

use burn::tensor::{DType, Int, Tensor, TensorData};
use half::f16;

use crate::cuda::{
    Cuda, Device, communicator,
    communicator::Communicator,
    testing::{Random, device},
};
use crate::link::{DeviceLink, LinkError, Parcel};

/// A communicator of one rank, or prints why there is none.
fn alone() -> Option<(Device, Communicator)> {
    let device = device()?;
    match communicator::ticket() {
        Ok(ticket) => {
            let made = communicator::connect(&device, &ticket, [0, 1], &|| false).unwrap();
            Some((device, made))
        }
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

/// Parcels of every type that ranks exchange.
fn parcels(device: &Device) -> Vec<Parcel<Cuda>> {
    let mut random = Random(7);
    let floats: Vec<f32> = (0..1000 * 1024).map(|_| random.normal() as f32).collect();
    let halves = random.halves::<f16>(96 * 32, 1.0);
    let codes: Vec<u8> = (0..64 * 96).map(|at| (at % 16) as u8).collect();
    let floats = TensorData::new(floats, [1000, 1024]);
    let halves = TensorData::new(halves, [96, 32]);
    let codes = TensorData::new(codes, [64, 96]);
    let floats = Tensor::<Cuda, 2>::from_data(floats, (device, DType::F32));
    vec![
        // A part of a matrix, whose rows are not one after the other.
        floats.clone().slice([100..200, 100..1024]).into(),
        floats.into(),
        Tensor::<Cuda, 2>::from_data(halves, (device, DType::F16)).into(),
        Tensor::<Cuda, 2, Int>::from_data(codes, (device, DType::U8)).into(),
    ]
}

#[test]
fn matrices_come_back_from_a_rank_that_sends_to_itself() {
    let Some((device, communicator)) = alone() else {
        return;
    };
    let parcels = parcels(&device);
    let kinds: Vec<_> = parcels.iter().map(|it| (0, it.kind())).collect();
    for _ in 0..3 {
        let sent = parcels.iter().map(|it| (0, it.clone())).collect();
        let found = communicator.exchange(sent, &kinds).unwrap();
        for (found, sent) in found.into_iter().zip(parcels.clone()) {
            // Both on the same stream, with no wait between them.
            assert_eq!(found.into_data(), sent.into_data());
        }
    }
    assert!(communicator.exchange(Vec::new(), &[]).unwrap().is_empty());
}

#[test]
fn an_exchange_after_the_end_is_an_error() {
    let Some((device, communicator)) = alone() else {
        return;
    };
    communicator.abort();
    communicator.abort();
    let sent = parcels(&device).into_iter().map(|it| (0, it));
    let sent: Vec<_> = sent.collect();
    let kinds: Vec<_> = sent.iter().map(|(to, it)| (*to, it.kind())).collect();
    let found = communicator.exchange(sent, &kinds);
    assert_eq!(found.err(), Some(LinkError::Ended));
}

#[test]
fn ranks_that_are_awaited_in_vain_are_given_up_once_the_run_has_ended() {
    let Some(device) = device() else { return };
    let Ok(ticket) = communicator::ticket() else {
        println!("skipped: no NCCL");
        return;
    };
    let (sender, ended) = channel();
    spawn(move || {
        let started = std::time::Instant::now();
        let ended = || started.elapsed() > Duration::from_secs(2);
        // Of two ranks, the other never comes.
        let made = communicator::connect(&device, &ticket, [0, 2], &ended);
        sender.send(made.err()).unwrap();
    });
    let error = ended.recv_timeout(Duration::from_secs(30)).unwrap();
    assert_eq!(error, Some(LinkError::Ended));
}

#[test]
fn an_identifier_of_another_length_is_refused() {
    let Some(device) = device() else { return };
    if communicator::ticket().is_err() {
        println!("skipped: no NCCL");
        return;
    }
    let error = communicator::connect(&device, &[1, 2, 3], [0, 1], &|| false).err();
    assert_eq!(
        error,
        Some(LinkError::Failed(
            "an NCCL identifier of 3 bytes".to_owned()
        ))
    );
}
