//! Library calls and Burn's kernels, raced against each other.

use burn::tensor::Tensor;

use crate::cuda::{
    Cuda, linear, swiglu,
    testing::{Random, device, tensor, values},
};

/// Library, kernel, library, Burn's own kernel, in turns; each reads what the one before wrote.
fn chain(
    mut x: Tensor<Cuda, 2>,
    w: &Tensor<Cuda, 2>,
    rounds: usize,
    wait: bool,
) -> Tensor<Cuda, 2> {
    let device = x.device();
    let settle = || {
        if wait {
            use burn::tensor::backend::Backend;
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

/// A product of 2048³ keeps the device busy far longer than its submission takes: were the
/// two sides on streams without an order, a kernel would start on an output that is still NaN.
#[test]
fn library_calls_and_kernels_run_in_the_order_they_were_submitted() {
    let Some(device) = device() else { return };
    let n = 2048;
    let mut random = Random(4);
    let x = tensor(&random.halves(n * n, 1.0), [n, n], &device);
    let w = tensor(&random.halves(n * n, 0.02), [n, n], &device);
    let expected = values(chain(x.clone(), &w, 6, true));
    for _ in 0..5 {
        let found = values(chain(x.clone(), &w, 6, false));
        assert!(found == expected, "the unsynchronised chain differs");
    }
    assert!(expected.iter().all(|v| v.is_finite()));
}

/// Another thread has another stream: the buffer's use there waits for its making here.
#[test]
fn a_buffer_made_on_another_thread_is_waited_for() {
    let Some(device) = device() else { return };
    let n = 2048;
    let mut random = Random(5);
    let x = tensor(&random.halves(n * n, 1.0), [n, n], &device);
    let w = tensor(&random.halves(n * n, 0.02), [n, n], &device);
    let expected = values(linear(linear(x.clone(), w.clone()).unwrap(), w.clone()).unwrap());
    for _ in 0..5 {
        let (x, w2) = (x.clone(), w.clone());
        let y = std::thread::spawn(move || linear(x, w2).unwrap())
            .join()
            .unwrap();
        assert!(values(linear(y, w.clone()).unwrap()) == expected);
    }
}
