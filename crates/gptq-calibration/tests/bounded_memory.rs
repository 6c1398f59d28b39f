//! A Parquet file is never whole in memory: 320 MB of text are drawn from within a tenth of it, as
//! an allocator that counts sees it.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arrow::array::{RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Schema};
use gptq_calibration::{
    Calibration, CalibrationSettings, Rendering, RowRange, Sampling, Source, Template,
    TextTokenizer,
};
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;

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

const ROWS_PER_BATCH: usize = 1000;
const BATCHES: usize = 32;
const ROW_BYTES: usize = 10_000;

#[test]
fn a_parquet_file_is_read_in_a_tenth_of_its_size() {
    let root: PathBuf = [env!("CARGO_MANIFEST_DIR"), "../.."].iter().collect();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("big.parquet");
    let fields = vec![Field::new("text", DataType::Utf8, false)];
    let schema = Arc::new(Schema::new(fields));
    let properties = WriterProperties::builder()
        .set_dictionary_enabled(false)
        .set_compression(Compression::SNAPPY)
        .set_max_row_group_row_count(Some(2 * ROWS_PER_BATCH))
        .build();
    let file = File::create(&path).unwrap();
    let mut writer = ArrowWriter::try_new(file, schema.clone(), Some(properties)).unwrap();
    // Few different rows, so that tokenising them takes no time: the others are read, and dropped
    // as repeats.
    let texts = ["fever ", "cough "].map(|word| word.repeat(ROW_BYTES / word.len()));
    for _ in 0..BATCHES {
        let rows = (0..ROWS_PER_BATCH).map(|i| texts[i % 2].as_str());
        let column = Arc::new(StringArray::from_iter_values(rows));
        let batch = RecordBatch::try_new(schema.clone(), vec![column]).unwrap();
        writer.write(&batch).unwrap();
    }
    writer.close().unwrap();

    let tokenizer = TextTokenizer::load(&root.join("tests/models/medi-tiny")).unwrap();
    let settings = CalibrationSettings {
        source: Source::Local(path),
        rendering: Rendering::Template(Template::column("text")),
        rows: RowRange::default(),
        min_tokens: 0,
        dedupe: true,
        samples: 2,
        seq_len: 64,
        seed: 0,
        sampling: Sampling::RandomWindows,
    };
    let before = ALIVE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let drawn = Calibration::draw(&settings, &tokenizer).unwrap();
    let peak = PEAK.load(Ordering::Relaxed) - before;
    assert_eq!(drawn.manifest.row_count, 2);
    let whole = BATCHES * ROWS_PER_BATCH * ROW_BYTES;
    assert!(peak < whole / 10, "{peak} bytes of {whole}");
}
