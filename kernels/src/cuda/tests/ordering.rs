//! Races between library calls and Burn's kernels.

use burn::tensor::{DType, Tensor, backend::Backend};
use cudarc::{
    cublas::result as cublas,
    driver::result::stream::{self, StreamKind},
};

use crate::cuda::{
    Cuda,
    blas::{Element, MatrixAt, product},
    buffer,
    error::Error,
    linear,
    stream::{Libraries, on_stream, on_stream_later, settle},
    swiglu,
    testing::{Random, device, poison, tensor},
};

/// Side of a square product that takes an H100 about 0.2 ms, several times as long as submitting
/// the next operation.
const SIDE: usize = 4096;

fn inputs(seed: u64, device: &crate::cuda::Device) -> [Tensor<Cuda, 2>; 2] {
    let mut random = Random(seed);
    [1.0, 0.02].map(|deviation| {
        let row = random.halves::<half::f16>(SIDE + 64, deviation);
        let values: Vec<_> = (0..SIDE * SIDE)
            .map(|at| row[(at * 31 + at / SIDE * 7) % row.len()])
            .collect();
        tensor(&values, [SIDE, SIDE], device)
    })
}

/// Alternates between library calls, our kernel and Burn's own; each reads what the previous one
/// wrote.
fn chain(
    mut x: Tensor<Cuda, 2>,
    w: &Tensor<Cuda, 2>,
    rounds: usize,
    wait: bool,
) -> Tensor<Cuda, 2> {
    let device = x.device();
    let settle = || {
        if wait {
            Cuda::sync(&device).unwrap();
        }
    };
    for _ in 0..rounds {
        let y = linear(x.clone(), w.clone()).unwrap();
        settle();
        let z = swiglu(y.clone(), x).unwrap();
        settle();
        x = linear(z, w.clone()).unwrap();
        settle();
        x = x + y;
        settle();
    }
    x
}

#[test]
fn library_calls_and_kernels_run_in_the_order_they_were_submitted() {
    let Some(device) = device() else { return };
    let [x, w] = inputs(4, &device);
    let expected = chain(x.clone(), &w, 4, true).into_data();
    assert!(expected.iter::<f32>().any(|v| v != 0.0 && v.is_finite()));
    for _ in 0..3 {
        let found = chain(x.clone(), &w, 4, false).into_data();
        assert!(found == expected, "the unsynchronised chain differs");
    }
}

/// Control for the test above: on a separate stream a product's output is read before it is
/// written.
#[test]
fn a_library_call_on_another_stream_is_overtaken() {
    let Some(device) = device() else { return };
    let [x, w] = inputs(6, &device);
    let [x, w] = [x, w].map(|it| buffer::float("test", "input", it, DType::F16).unwrap());
    let [y, other] = [(); 2].map(|()| buffer::empty(&x, [SIDE, SIDE], DType::F16));
    let handles = on_stream(&[&x], |_, _| {
        let stream = stream::create(StreamKind::NonBlocking).unwrap();
        let handle = cublas::create_handle().unwrap();
        // SAFETY: both were just made.
        unsafe { cublas::set_stream(handle, stream.cast()) }.unwrap();
        Ok([stream as usize, handle as usize])
    })
    .unwrap();
    // The last product writes `y`; those before it give the sum time to overtake.
    let unordered = |products: usize| {
        on_stream(&[&x, &w, &y, &other], |libraries, pointers| {
            let apart = Libraries {
                stream: handles[0] as _,
                cublas: handles[1] as _,
                cusolver: libraries.cusolver,
                device: libraries.device,
            };
            let [x, w, y, other] =
                [0, 1, 2, 3].map(|at| MatrixAt::at(pointers[at], 0, SIDE, Element::F16));
            for at in 1..=products {
                let out = if at == products { y } else { other };
                // SAFETY: three distinct buffers of this side.
                unsafe { product(&apart, [SIDE; 3], x, w.t(), 0.0, out)? };
            }
            Ok(())
        })
        .unwrap();
    };
    let settle = || {
        Cuda::sync(&device).unwrap();
        on_stream(&[&x], |_, _| {
            // SAFETY: the stream was made above.
            unsafe { stream::synchronize(handles[0] as _) }.unwrap();
            Ok(())
        })
        .unwrap();
    };
    // Loads the product's kernel and compiles the sum's, both slower than the race.
    unordered(1);
    drop(buffer::into_float::<2>(y.clone()).add_scalar(0.0));
    settle();
    // The race depends on the device's load: the longer the queue, the more certain the result.
    let overtaken = (5..9).any(|doublings| {
        poison(&y);
        settle();
        unordered(1 << doublings);
        let early = buffer::into_float::<2>(y.clone()).add_scalar(0.0);
        settle();
        let late = buffer::into_float::<2>(y.clone()).into_data();
        assert!(late.iter::<f32>().all(f32::is_finite));
        early.into_data() != late
    });
    assert!(overtaken, "the product was not overtaken");
}

/// Another thread has another stream, which waits for the buffer to be written here.
#[test]
fn a_buffer_made_on_another_thread_is_waited_for() {
    let Some(device) = device() else { return };
    let [x, w] = inputs(5, &device);
    let expected = linear(linear(x.clone(), w.clone()).unwrap(), w.clone())
        .unwrap()
        .into_data();
    for _ in 0..3 {
        let (x, w2) = (x.clone(), w.clone());
        let y = std::thread::spawn(move || linear(x, w2).unwrap())
            .join()
            .unwrap();
        assert!(linear(y, w.clone()).unwrap().into_data() == expected);
    }
}

#[test]
fn an_error_that_nobody_waited_for_comes_up_at_the_threads_next_call_and_once() {
    let Some(device) = device() else { return };
    let x = tensor::<half::f16, 2>(&[half::f16::ONE; 16], [4, 4], &device);
    let x = buffer::float("test", "x", x, DType::F16).unwrap();
    let late = || {
        let failed = |_: &Libraries, _: &[u64]| {
            Err(Error::Shape {
                operation: "late",
                reason: "a shape".to_owned(),
            })
        };
        on_stream_later(&[&x], failed).unwrap();
    };
    let is_late = |found: Result<(), Error>| found.unwrap_err().to_string() == "late: a shape";
    late();
    assert!(is_late(on_stream(&[&x], |_, _| Ok(()))));
    late();
    assert!(is_late(settle(device.index)));
    late();
    assert!(is_late(buffer::download::<half::f16>(&x).map(|_| ())));
    assert_eq!(buffer::download::<half::f16>(&x).unwrap().len(), 16);
    settle(device.index).unwrap();
}
