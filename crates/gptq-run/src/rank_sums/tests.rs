//! Sums between devices compared with those by messages, on ranks that are threads.

use std::thread::scope;

use gptq_kernels::Cpu;
use gptq_ranks::{Collective, Threads};

use super::*;
use crate::host_link::HostLink;

/// A value of a rank's matrix, such that different orders of sums give different bits.
fn value(rank: usize, at: usize) -> f32 {
    let number = (rank * 7919 + at * 104_729) % 1009;
    (number as f32 - 500.0) * 10f32.powi((number % 13) as i32 - 6)
}

fn matrix(rank: usize, shape: [usize; 2]) -> Tensor<Cpu, 2> {
    let values: Vec<f32> = (0..shape[0] * shape[1]).map(|at| value(rank, at)).collect();
    let device = Default::default();
    Tensor::from_data(TensorData::new(values, shape), (&device, DType::F32))
}

/// Sums on each of `size` ranks of the matrices that `given` ranks have, by a link or by messages; only what counts.
fn sums(
    size: usize,
    given: &[bool],
    part: SumPart,
    shape: [usize; 2],
    linked: bool,
) -> Vec<Option<Vec<f32>>> {
    let ranks = Threads::ranks(size).unwrap();
    scope(|scope| {
        let threads: Vec<_> = ranks
            .iter()
            .map(|ranks| {
                scope.spawn(move || {
                    let device = Default::default();
                    let rank = ranks.share().rank;
                    let link = HostLink::<Cpu>::new(ranks, &device);
                    let peers = Peers {
                        ranks,
                        link: linked.then_some(&link as &dyn DeviceLink<Cpu>),
                    };
                    let summand = || Summand {
                        own: given[rank].then(|| matrix(rank, shape)),
                        given: given.to_vec(),
                        part,
                        shape,
                    };
                    // Two at once, as a tap of experts has them.
                    let sums = sum_ranks(vec![summand(), summand()], &peers, &device).unwrap();
                    let sums = sums.into_iter().map(|sum| {
                        let values = sum?.into_data().into_vec::<f32>().unwrap();
                        let rows = values.chunks_exact(shape[1]).enumerate();
                        let counts = |row| if part == SumPart::Upper { row } else { 0 };
                        Some(
                            rows.flat_map(|(row, of)| of[counts(row)..].to_vec())
                                .collect(),
                        )
                    });
                    let [one, two]: [Option<Vec<f32>>; 2] =
                        sums.collect::<Vec<_>>().try_into().unwrap();
                    assert_eq!(one, two);
                    one
                })
            })
            .collect();
        threads.into_iter().map(|it| it.join().unwrap()).collect()
    })
}

#[test]
fn sums_between_devices_are_those_by_messages_to_the_bit_on_every_rank() {
    for size in [2, 4, 8] {
        let all = vec![true; size];
        let some: Vec<bool> = (0..size).map(|rank| rank % 3 == 1).collect();
        for given in [all, some, vec![false; size]] {
            for (part, shape) in [(SumPart::Upper, [40, 40]), (SumPart::Whole, [6, 40])] {
                let linked = sums(size, &given, part, shape, true);
                let told = sums(size, &given, part, shape, false);
                assert_eq!(linked, told, "{size} {given:?} {part:?}");
                assert!(linked.iter().all(|it| *it == linked[0]));
                assert_eq!(linked[0].is_some(), given.contains(&true));
            }
        }
    }
}

#[test]
fn triangles_of_several_panels_are_put_together() {
    let shape = [PANEL + 64; 2];
    let given = [true, true];
    let linked = sums(2, &given, SumPart::Upper, shape, true);
    assert_eq!(linked, sums(2, &given, SumPart::Upper, shape, false));
}
