//! A Parquet or Arrow file is never whole in memory: 320 MB of incompressible data are processed in
//! a tenth of that, as measured by a counting allocator.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arrow::array::{ArrayRef, RecordBatch, StringArray};
use arrow::ipc::writer::FileWriter;
use gptq_calibration::{
    Calibration, CalibrationSettings, OnError, Rendering, RowRange, Sampling, Source, Template,
    TextTokenizer,
};
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

struct Counting;

static ALIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged; counting touches no memory of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let alive = ALIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(alive, Ordering::Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        ALIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Memory bound for a file of any size, in bytes.
const BOUND: usize = 32 << 20;

const ROWS_PER_BATCH: usize = 1000;
const BATCHES: usize = 32;
const ROW_BYTES: usize = 10_000;

/// Number of distinct rows: few, so that tokenizing is fast (the others are read, and dropped as
/// repeats), but so many that no repeat is within the 64 KiB window of Snappy.
const TEXTS: usize = 16;

/// Generates random texts of 64 letters, which Snappy cannot compress.
fn texts() -> Vec<String> {
    let letters = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let mut text = || {
        let mut bytes = vec![0; ROW_BYTES];
        rng.fill_bytes(&mut bytes);
        let letter = |byte: u8| char::from(letters[usize::from(byte % 64)]);
        bytes.into_iter().map(letter).collect()
    };
    (0..TEXTS).map(|_| text()).collect()
}

fn batches() -> impl Iterator<Item = RecordBatch> {
    let texts = texts();
    (0..BATCHES).map(move |_| {
        let rows = texts.iter().cycle().take(ROWS_PER_BATCH);
        let column: ArrayRef = Arc::new(StringArray::from_iter_values(rows));
        RecordBatch::try_from_iter([("text", column)]).unwrap()
    })
}

/// Writes row groups of a quarter of the rows, each larger than the bound.
fn write_parquet(path: &Path) {
    let properties = WriterProperties::builder()
        .set_dictionary_enabled(false)
        .set_compression(Compression::SNAPPY)
        .set_max_row_group_row_count(Some(BATCHES / 4 * ROWS_PER_BATCH))
        .build();
    let mut batches = batches().peekable();
    let schema = batches.peek().unwrap().schema();
    let file = File::create(path).unwrap();
    let mut writer = ArrowWriter::try_new(file, schema, Some(properties)).unwrap();
    batches.for_each(|batch| writer.write(&batch).unwrap());
    let written = writer.close().unwrap();
    for group in written.row_groups() {
        assert!(group.compressed_size() as usize > BOUND, "{group:?}");
    }
}

fn write_arrow(path: &Path) {
    let mut batches = batches().peekable();
    let schema = batches.peek().unwrap().schema();
    let mut writer = FileWriter::try_new(File::create(path).unwrap(), &schema).unwrap();
    batches.for_each(|batch| writer.write(&batch).unwrap());
    writer.finish().unwrap();
}

// A single test: files of this size one after the other, without other allocations.
#[test]
fn a_columnar_file_is_read_in_a_tenth_of_its_size() {
    let root: PathBuf = [env!("CARGO_MANIFEST_DIR"), "../.."].iter().collect();
    let tokenizer = TextTokenizer::load(&root.join("tests/models/medi-tiny")).unwrap();
    for (name, write) in [
        ("big.parquet", write_parquet as fn(&Path)),
        ("big.arrow", write_arrow),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        write(&path);
        let size = std::fs::metadata(&path).unwrap().len() as usize;
        assert!(size >= 300_000_000, "{name}: {size} bytes on disk");
        assert!(size >= 5 * BOUND, "{name}: {size} bytes on disk");
        let settings = CalibrationSettings {
            source: Source::Local(path),
            rendering: Rendering::Template(Template::column("text")),
            rows: RowRange::default(),
            min_tokens: 0,
            dedupe: true,
            on_error: OnError::Stop,
            date: None,
            samples: 2,
            seq_len: 64,
            seed: 0,
            sampling: Sampling::RandomWindows,
        };
        let before = ALIVE.load(Ordering::Relaxed);
        PEAK.store(before, Ordering::Relaxed);
        let drawn = Calibration::draw(&settings, &tokenizer).unwrap();
        let peak = PEAK.load(Ordering::Relaxed) - before;
        assert_eq!(drawn.manifest.row_count, TEXTS);
        assert!(peak < BOUND, "{name}: {peak} bytes of {size}");
    }
}
