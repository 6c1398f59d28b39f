//! Writing the journal of a run under way ([`gptq_plan::RecordedRun`] reads it).
//!
//! The packed tensors of the finished blocks give the hidden states again; now and then these are saved too, and the
//! block's line has their digest ([`crate::saved_states`]). The file goes when the last branch is in place.

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use gptq_format::{FormatError, write_file};
use gptq_plan::{FinishedBlock, Header, JOURNAL, MAX_JOURNAL, RecordedRun, journal_line};

use crate::saved_states::prune;

/// A journal being written.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
}

impl Journal {
    /// Begins one in `output`.
    pub(crate) fn create(output: &Path, header: &Header) -> Result<Self, FormatError> {
        let path = output.join(JOURNAL);
        write_file(&path, &journal_line(header))?;
        // Its name is to be on the disk as well.
        File::open(output)
            .and_then(|dir| dir.sync_all())
            .map_err(FormatError::io(output))?;
        Journal::open(path)
    }

    /// Goes on with one.
    pub(crate) fn reopen(output: &Path, recorded: &RecordedRun) -> Result<Self, FormatError> {
        let journal = Journal::open(output.join(JOURNAL))?;
        // What a process that died wrote last may be half a line.
        (journal.file)
            .set_len(recorded.length)
            .map_err(FormatError::io(&journal.path))?;
        Ok(journal)
    }

    fn open(path: PathBuf) -> Result<Self, FormatError> {
        match OpenOptions::new().write(true).open(&path) {
            Ok(file) => Ok(Journal { path, file }),
            Err(e) => Err(FormatError::io(path)(e)),
        }
    }

    /// Adds a block, and waits until it is on the disk. Of hidden states, only the last kept stay.
    pub(crate) fn append(&mut self, block: &FinishedBlock) -> Result<(), FormatError> {
        let line = journal_line(block);
        let file = &mut self.file;
        let end = file
            .seek(SeekFrom::End(0))
            .map_err(FormatError::io(&self.path))?;
        if end + line.len() as u64 > MAX_JOURNAL {
            return Err(FormatError::Malformed {
                path: self.path.clone(),
                reason: format!("would be over {MAX_JOURNAL} bytes, and not be read again"),
            });
        }
        file.write_all(&line)
            .and_then(|()| file.sync_data())
            .map_err(FormatError::io(&self.path))?;
        match (&block.states, self.path.parent()) {
            (Some(_), Some(output)) => prune(output, Some(block.layer)),
            _ => Ok(()),
        }
    }

    /// Removes the journal of `output`, and the hidden states that were kept with it.
    pub(crate) fn remove(output: &Path) -> Result<(), FormatError> {
        prune(output, None)?;
        let path = output.join(JOURNAL);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(FormatError::io(&path)(e)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use gptq_plan::{BranchBlock, Fingerprint, LinearReport, Origin, RecipeOverrides};
    use gptq_solver::Gains;
    use serde_json::Value;

    use super::*;

    fn header() -> Header {
        let origin = Origin {
            path: "r.toml".into(),
            recipe: "# mine".into(),
            overrides: RecipeOverrides::default(),
            directory: "/".into(),
        };
        let prints = [Fingerprint::default(), Fingerprint::default()];
        Header::new(
            origin,
            prints,
            String::new(),
            BTreeMap::new(),
            BTreeMap::new(),
        )
    }

    fn block(layer: usize) -> FinishedBlock {
        let linear = LinearReport {
            layer,
            name: "x".into(),
            shape: [1, 2],
            bits: gptq_format::Bits::Four,
            group_size: gptq_format::GroupSize::Row,
            // Numbers that JSON's parser gets wrong in the last bit are among these.
            relative_error: (layer as f64 + 0.1).ln() * 1e-7,
            rtn_error: std::f64::consts::PI * 1e-300,
            ratio: 1.0 / 3.0,
            gains: Gains {
                scale_search: Some(2.0_f64.sqrt() * 1e-5),
                ..Gains::default()
            },
            output_error: Some(1.0 / 7.0),
            rtn_output_error: Some(2.0 / 7.0),
            solver_objective: None,
            damp_percent: 0.1,
            dead_columns: 0,
            seconds: 1.5e-9,
            digests: None,
        };
        let one = BranchBlock {
            seconds: 2.0,
            linears: vec![linear],
            clamped: Vec::new(),
            tuning: None,
            expert_tokens: Vec::new(),
            output_error: Some(1e-3 / 3.0),
        };
        FinishedBlock {
            layer,
            source: "0".to_owned(),
            branches: BTreeMap::from([("main".to_owned(), one)]),
            states: None,
        }
    }

    #[test]
    fn what_is_written_is_read_back_bit_for_bit() {
        let dir = tempfile::tempdir().unwrap();
        assert!(RecordedRun::read(dir.path()).unwrap().is_none());
        let mut journal = Journal::create(dir.path(), &header()).unwrap();
        let blocks: Vec<FinishedBlock> = (0..50).map(block).collect();
        for block in &blocks {
            journal.append(block).unwrap();
        }
        let read = RecordedRun::read(dir.path()).unwrap().unwrap();
        assert_eq!(read.blocks, blocks);
        assert_eq!(read.header.origin.recipe, "# mine");
        Journal::remove(dir.path()).unwrap();
        assert!(RecordedRun::read(dir.path()).unwrap().is_none());
    }

    #[test]
    fn a_record_of_before_outputs_were_compared_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(JOURNAL);
        let mut journal = Journal::create(dir.path(), &header()).unwrap();
        journal.append(&block(0)).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let (first, record) = text.split_once('\n').unwrap();
        let mut record: Value = serde_json::from_str(record).unwrap();
        let branch = record["branches"]["main"].as_object_mut().unwrap();
        branch.remove("output_error").unwrap();
        let linear = branch["linears"][0].as_object_mut().unwrap();
        for key in ["output_error", "rtn_output_error"] {
            linear.remove(key).unwrap();
        }
        fs::write(&path, format!("{first}\n{record}\n")).unwrap();
        let read = RecordedRun::read(dir.path()).unwrap().unwrap();
        let branch = &read.blocks[0].branches["main"];
        assert_eq!(branch.output_error, None);
        assert_eq!(branch.linears[0].output_error, None);
        let before = &block(0).branches["main"].linears[0];
        assert_eq!(branch.linears[0].relative_error, before.relative_error);
    }

    #[test]
    fn digests_of_earlier_versions_are_read_and_written_as_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(JOURNAL);
        let mut journal = Journal::create(dir.path(), &header()).unwrap();
        journal.append(&block(0)).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let digests = r#"{"g_idx":"d","qweight":"a","qzeros":"b","scales":"c"}"#;
        let text = text.replace(
            r#""damp_percent""#,
            &format!(r#""digests":{digests},"damp_percent""#),
        );
        fs::write(&path, text).unwrap();
        let read = RecordedRun::read(dir.path()).unwrap().unwrap();
        let linear = &read.blocks[0].branches["main"].linears[0];
        let found = linear.digests.as_ref().unwrap();
        let recorded = [
            ("qweight", "a"),
            ("qzeros", "b"),
            ("scales", "c"),
            ("g_idx", "d"),
        ];
        for (suffix, digest) in recorded {
            assert_eq!(found.get(suffix), Some(digest));
        }
        let again = String::from_utf8(journal_line(linear)).unwrap();
        assert!(
            again.contains(&format!(r#""digests":{digests}"#)),
            "{again}"
        );
    }

    #[test]
    fn a_journal_cut_anywhere_loses_only_the_block_it_was_cut_in() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(JOURNAL);
        let mut journal = Journal::create(dir.path(), &header()).unwrap();
        let begin = fs::metadata(&path).unwrap().len() as usize;
        for layer in 0..3 {
            journal.append(&block(layer)).unwrap();
        }
        let whole = fs::read(&path).unwrap();
        for cut in begin..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let read = RecordedRun::read(dir.path()).unwrap().unwrap();
            let lines = whole[begin..cut].iter().filter(|&&b| b == b'\n').count();
            assert_eq!(read.blocks.len(), lines);
            let mut journal = Journal::reopen(dir.path(), &read).unwrap();
            journal.append(&block(lines)).unwrap();
            let read = RecordedRun::read(dir.path()).unwrap().unwrap();
            assert_eq!(read.blocks.len(), lines + 1);
        }
    }

    #[test]
    fn damage_before_the_last_line_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(JOURNAL);
        let mut journal = Journal::create(dir.path(), &header()).unwrap();
        journal.append(&block(0)).unwrap();
        journal.append(&block(1)).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        for bad in [
            text.replace("\"layer\":0", "\"layer\":7"),
            text.replacen("\"version\":2", "\"version\":9", 1),
            text[1..].to_owned(),
            String::new(),
        ] {
            fs::write(&path, bad).unwrap();
            let error = RecordedRun::read(dir.path()).unwrap_err().to_string();
            assert!(error.contains("--restart"), "{error}");
        }
    }
}
