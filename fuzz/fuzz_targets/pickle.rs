//! Any bytes as the pickle of an otherwise valid PyTorch file.
#![no_main]

use std::io::Write;

use libfuzzer_sys::fuzz_target;
use rawzip::{CompressionMethod, ZipArchiveWriter};

fuzz_target!(|pickle: &[u8]| {
    let mut file = Vec::new();
    let mut archive = ZipArchiveWriter::new(&mut file);
    for (name, bytes) in [
        ("a/data.pkl", pickle),
        ("a/byteorder", b"little"),
        ("a/data/0", &[0x3c; 24]),
    ] {
        let (mut entry, config) = archive
            .new_file(name)
            .compression_method(CompressionMethod::STORE)
            .start()
            .expect("memory can be written");
        let mut writer = config.wrap(&mut entry);
        writer.write_all(bytes).expect("memory can be written");
        let (_, descriptor) = writer.finish().expect("memory can be written");
        entry.finish(descriptor).expect("memory can be written");
    }
    archive.finish().expect("memory can be written");
    gptq_fuzz::open(&[("pytorch_model.bin", &file)]);
});
