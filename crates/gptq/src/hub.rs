//! Downloads a recipe's inputs from the Hub.

use std::cell::{Cell, OnceCell};
use std::fs;
use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use gptq_calibration::{Source, TextTokenizer};
use gptq_hub::{DataFiles, Hub, HubSettings, RepoId, STALL, Snapshot};
use gptq_plan::{FetchedInputs, InputSource, Plan, Recipe, calibration_source, model_source};
use indicatif::{ProgressBar, ProgressStyle};

use crate::{environment, log, size};

/// Interval of progress lines without a terminal.
const MINUTE: Duration = Duration::from_secs(60);

/// Parts of the model that a command needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// Config and tokenizer.
    Shapes,
    /// Weights too.
    Weights,
}

/// Downloads the inputs that `recipe` names on the Hub; a recipe of local files makes no request.
/// Small files come first and are checked before the large ones: the shapes, then the plan and the
/// tokenizer, then the rows, then the weights.
pub(crate) fn fetch(recipe: &Recipe, model: Need, rows: bool) -> Result<FetchedInputs> {
    let mut fetched = FetchedInputs::default();
    let hub = OnceCell::new();
    let connect = || match hub.get() {
        Some(hub) => Ok(hub),
        None => Hub::new(settings()?)
            .map(|new| hub.get_or_init(|| new))
            .map_err(anyhow::Error::from),
    };
    let (source, calibration) = (model_source(recipe)?, calibration_source(recipe)?);
    let mut side = None;
    if let InputSource::Hub { repo, revision } = &source {
        let id = repo_id(repo)?;
        let snapshot = match model {
            Need::Shapes => connect()?.model_side(&id, revision)?,
            Need::Weights => connect()?.model_ahead(&id, revision)?,
        };
        warn(repo, &snapshot);
        fetched.model = Some(snapshot.dir.clone());
        side = Some((repo, id, snapshot));
    }
    if rows && (side.is_some() || matches!(calibration, InputSource::Hub { .. })) {
        Plan::new(recipe, &fetched)?;
    }
    if rows && let Some((repo, _, snapshot)) = &side {
        ensure!(
            snapshot.files.iter().any(|name| name == "tokenizer.json"),
            "{repo} has no tokenizer.json; name a revision that has one, or download it, have \
             Transformers' AutoTokenizer save one beside it, and name the directory"
        );
        TextTokenizer::load(&snapshot.dir)?;
        if let InputSource::Local(path) = &calibration
            && !path.exists()
            && !path.to_string_lossy().contains(['*', '?', '['])
        {
            // A missing file gives the error that reading it would.
            let none = &mut |_| Ok(ControlFlow::Break(()));
            Source::Local(path.clone()).rows(&[], none)?;
        }
    }
    if rows && let InputSource::Hub { repo, revision } = calibration {
        let id = repo_id(&repo)?;
        let wanted = DataFiles {
            readable: &Source::reads,
            pattern: recipe.calibration_files(),
        };
        let there = connect()?;
        let snapshot = with_bar(&repo, |progress| {
            there.dataset(&id, &revision, wanted, progress)
        })?;
        warn(&repo, &snapshot);
        let files = snapshot.files.into_iter();
        fetched.calibration = Some(Source::Dataset {
            name: repo,
            revision: snapshot.commit,
            files: files
                .map(|name| (name.clone(), snapshot.dir.join(name)))
                .collect(),
        });
    }
    if model == Need::Weights
        && let Some((repo, id, side)) = side
    {
        // Uses the commit that was checked, even if the revision has moved since.
        let there = connect()?;
        let snapshot = with_bar(repo, |progress| there.model(&id, &side.commit, progress))?;
        if !side.stale {
            warn(repo, &snapshot);
        }
    }
    Ok(fetched)
}

/// Downloads a model's config, and its other small files, and returns their directory.
///
/// # Errors
/// No such model, or no connection.
pub(crate) fn model_shapes(repo: &str, revision: &str) -> Result<PathBuf> {
    let snapshot = Hub::new(settings()?)?.model_side(&repo_id(repo)?, revision)?;
    warn(repo, &snapshot);
    Ok(snapshot.dir)
}

/// Reads `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HUB_DISABLE_IMPLICIT_TOKEN`,
/// `HF_HUB_OFFLINE`, `HF_HOME`, `HF_HUB_CACHE` and `HF_HUB_DOWNLOAD_TIMEOUT`.
///
/// # Errors
/// An invalid value of a variable.
pub(crate) fn settings() -> Result<HubSettings> {
    let endpoint = environment::address("HF_ENDPOINT")?;
    let disabled = environment::is_on("HF_HUB_DISABLE_IMPLICIT_TOKEN")?;
    Ok(HubSettings {
        endpoint: endpoint.unwrap_or_else(|| "https://huggingface.co".to_owned()),
        token: if disabled { None } else { token() },
        cache: environment::path("HF_HUB_CACHE").unwrap_or_else(|| home().join("hub")),
        offline: environment::is_on("HF_HUB_OFFLINE")?,
        stall: environment::seconds("HF_HUB_DOWNLOAD_TIMEOUT")?.unwrap_or(STALL),
    })
}

/// Returns the token of the logged-in user, whether or not it may be sent.
pub(crate) fn token() -> Option<String> {
    environment::text("HF_TOKEN").or_else(|| {
        let file = environment::path("HF_TOKEN_PATH").unwrap_or_else(|| home().join("token"));
        let token = fs::read_to_string(file).ok()?;
        Some(token.trim().to_owned()).filter(|token| !token.is_empty())
    })
}

/// Returns the directory of Hugging Face's tools.
fn home() -> PathBuf {
    environment::path("HF_HOME").unwrap_or_else(|| {
        // As in the Hub's own client: a set XDG_CACHE_HOME may have any form.
        let cache = environment::path("XDG_CACHE_HOME").or_else(environment::cache_directory);
        cache.unwrap_or_default().join("huggingface")
    })
}

/// Parses `owner/name`; the error lists the other kinds of sources.
pub(crate) fn repo_id(text: &str) -> Result<RepoId> {
    RepoId::parse(text).ok_or_else(|| {
        anyhow!("{text:?} is neither a local path nor the owner/name of a repository on the Hub")
    })
}

/// Warns about uncertainties of a snapshot from the cache.
fn warn(repo: &str, snapshot: &Snapshot) {
    if snapshot.stale {
        log::warning(&format!(
            "the Hub cannot be reached; using {repo} at {} from the cache",
            snapshot.commit
        ));
    }
    if snapshot.unchecked {
        log::warning(&format!(
            "{repo} was downloaded into the cache by another tool, so its completeness \
             could not be checked; run once without HF_HUB_OFFLINE to make sure"
        ));
    }
}

/// Reports the download's size and progress: a bar on a terminal, otherwise one line a minute and
/// one at the end; nothing if no file is missing.
fn with_bar<T>(
    repo: &str,
    work: impl FnOnce(&dyn Fn(gptq_hub::DownloadProgress)) -> Result<T, gptq_hub::HubError>,
) -> Result<T, gptq_hub::HubError> {
    let terminal = std::io::stderr().is_terminal();
    let style = "{prefix} {bar:30} {bytes:>10}/{total_bytes:<10} {bytes_per_sec:>12} {eta:>4}";
    let style = ProgressStyle::with_template(style).expect("the template is a constant");
    let bar = match terminal {
        true => ProgressBar::new(0),
        false => ProgressBar::hidden(),
    };
    let bar = bar.with_style(style).with_prefix(last(repo));
    let (begun, told) = (Cell::new(None), Cell::new(Instant::now()));
    let result = work(&|progress| {
        let total = size::decimal(progress.total);
        if progress.files == 0 {
            return;
        }
        if begun.get().is_none() {
            begun.set(Some((Instant::now(), progress.total)));
            let files = match progress.files {
                1 => "1 file".to_owned(),
                n => format!("{n} files"),
            };
            eprintln!("downloading {files} of {repo}, {total}");
        }
        bar.set_length(progress.total);
        bar.set_position(progress.done);
        if !terminal && told.get().elapsed() >= MINUTE {
            told.set(Instant::now());
            let done = size::decimal(progress.done);
            eprintln!("downloading {repo}: {done} of {total}");
        }
    });
    bar.finish_and_clear();
    if !terminal
        && result.is_ok()
        && let Some((begun, total)) = begun.get()
    {
        let seconds = Duration::from_secs(begun.elapsed().as_secs());
        eprintln!(
            "downloaded {repo}: {} in {}",
            size::decimal(total),
            humantime::format_duration(seconds)
        );
    }
    result
}

fn last(repo: &str) -> String {
    let name = Path::new(repo).file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}
