//! The model card: a matrix's `README.md` for the Hub, from a minijinja template that the user may
//! replace. A template receives [`Facts`], serialized.

use gptq_format::{Bits, Client, GroupSize};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, UndefinedBehavior};
use serde::Serialize;

use crate::base_card::BaseCard;
use crate::description::description;
use crate::{Accuracy, Branch, Matrix, PromptTemplate, ReportError, Windows, number};

const TEMPLATE: &str = include_str!("../templates/card.md");

/// Card settings that the files of a matrix do not hold.
#[derive(Clone, Debug)]
pub struct CardSettings {
    /// Target repository, `user/name`.
    pub repo: String,
    /// Prompt template of the model.
    pub prompt: PromptTemplate,
    /// The base model's own card.
    pub base_card: Option<String>,
    /// Hub id of the base model; by default the name in the reports, if it is one.
    pub base_model: Option<String>,
    /// Hub id of the calibration data; by default the source in the manifests, if it is one.
    pub dataset: Option<String>,
    /// Licence identifier; by default the base card's.
    pub license: Option<String>,
    /// Language code; by default the base card's.
    pub language: Option<String>,
}

/// Variables of a template.
#[derive(Clone, Debug, Serialize)]
pub struct Facts {
    /// `user/name` on the Hub.
    repo: String,
    /// Owner part of `repo`.
    user: String,
    /// Name part of `repo`.
    title: String,
    /// The base model's name, without its owner.
    base_name: String,
    /// Hub id of the base model, if known.
    base_model: Option<String>,
    /// Licence identifier, or `unknown`.
    license: String,
    /// Entries of the front matter, each in YAML.
    front: Vec<String>,
    /// Architecture, from `config.json`.
    model_type: String,
    /// Context in tokens, if `config.json` has it.
    context: Option<u64>,
    /// Name and text of the prompt template.
    prompt_name: String,
    prompt: String,
    /// The prompt, escaped for a Python string between `"""`.
    prompt_python: String,
    /// True if it is the tokenizer's chat template.
    prompt_own: bool,
    /// The branches.
    branches: Vec<BranchFacts>,
    /// Branch used in the examples.
    example: String,
    /// First branches that TGI and vLLM load.
    tgi: Option<String>,
    vllm: Option<String>,
    /// Compute dtype of the branches, from `config.json`.
    dtype: String,
    /// Format of the first branch's files.
    format: &'static str,
    /// Names of the clients, in the order of `BranchFacts::loads`.
    clients: Vec<&'static str>,
    /// Tested version of each client, and how it was tested.
    tried: Vec<&'static str>,
    /// Windows that perplexity was measured on, one column each.
    measured_on: Vec<MeasuredOn>,
    /// Tasks that accuracy was measured on, one column each.
    tasks: Vec<TaskColumn>,
    /// Version of gptq.
    gptq_version: String,
    /// The base model's card, without its front matter.
    base_card: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
struct MeasuredOn {
    /// `eval.json, windows of 1024`.
    name: String,
    /// Perplexity of the dense model, if all branches agree on it.
    dense: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
struct TaskColumn {
    /// `pubmedqa, 3 shots`.
    name: String,
    /// Number of questions, if known.
    questions: Option<usize>,
    /// Accuracy of the dense model in percent, if all branches agree on it.
    dense: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
struct BranchFacts {
    name: String,
    /// `"4"`, or `"mixed"`.
    bits: String,
    /// `"128"`, `"none"`, or `"mixed"`.
    group_size: String,
    act_order: bool,
    /// "yes", "no", or "static" with groups of columns in their original order.
    order: &'static str,
    damp_percent: f64,
    /// Calibration data, as a link if it is on the Hub.
    dataset: String,
    samples: usize,
    seq_len: usize,
    /// Size of the weight files.
    size: String,
    exllama: bool,
    description: String,
    /// Perplexity, and its increase over the dense model's, on each of `measured_on`; `None` if not
    /// measured.
    perplexities: Vec<Option<String>>,
    /// Accuracy in percent with its standard error, and the difference from the dense model's, on each of `tasks`.
    accuracies: Vec<Option<String>>,
    /// Failed checks of `gptq verify`.
    failure: Option<String>,
    /// `None` for a client that loads it, otherwise the reason why not.
    loads: Vec<Option<&'static str>>,
}

/// Collects the template variables for `matrix`.
///
/// # Errors
/// A repository that is not `user/name`.
pub fn facts(matrix: &Matrix, settings: &CardSettings) -> Result<Facts, ReportError> {
    let (user, title) = repository(&settings.repo)?;
    let base = settings.base_card.as_deref().map(BaseCard::parse);
    let model = matrix.model();
    let base_model = settings.base_model.clone().or_else(|| hub_id(model));
    let first = &matrix.branches[0];
    let calibrated = settings
        .dataset
        .clone()
        .or_else(|| hub_id(&first.report.calibration.source));
    let license = settings.license.clone();
    let license = license.or_else(|| base.as_ref()?.scalar("license"));
    let model_type = first.config["model_type"].as_str().unwrap_or("llama");
    let dtype = ["dtype", "torch_dtype"]
        .iter()
        .find_map(|key| first.config[key].as_str());
    let dtype = dtype.unwrap_or("float16");
    let format = first.report.quantize_config.checkpoint_format;
    let (windows, tasks) = (matrix.windows(), matrix.tasks());
    let branches: Vec<BranchFacts> = matrix
        .branches
        .iter()
        .map(|branch| BranchFacts::new(branch, &windows, &tasks, settings))
        .collect();
    // Programs that load none of them would fill the table with their reasons.
    let shown = |at: usize| branches.iter().any(|b| b.loads[at].is_none());
    let shown: Vec<usize> = (0..Client::ALL.len()).filter(|at| shown(*at)).collect();
    let loads = |client: Client| {
        let at = Client::ALL.iter().position(|c| *c == client)?;
        let branch = branches.iter().find(|b| b.loads[at].is_none())?;
        Some(branch.name.clone())
    };
    let dense_on = |windows: &Windows| {
        let measured = matrix
            .branches
            .iter()
            .filter_map(|b| b.measured_on(windows));
        let mut dense = measured.filter_map(|it| it.dense_perplexity);
        dense.next().filter(|first| dense.all(|d| d == *first))
    };
    let measured_on = windows.iter().map(|windows| MeasuredOn {
        name: cell(&windows.name()),
        dense: dense_on(windows).map(|value| format!("{value:.3}")),
    });
    let measured_on = measured_on.collect();
    let dense_task = |task: &Accuracy| {
        let own = matrix.branches.iter().filter_map(|b| b.accuracy_on(task));
        let mut dense = own.filter_map(|it| it.dense_accuracy);
        dense.next().filter(|first| dense.all(|d| d == *first))
    };
    let tasks = tasks.iter().map(|task| TaskColumn {
        name: cell(&task.task),
        questions: task.questions,
        dense: dense_task(task).map(|value| format!("{:.2} %", 100.0 * value)),
    });
    let tasks = tasks.collect();
    let license = license.unwrap_or_else(|| "unknown".to_owned());
    let (tgi, vllm) = (loads(Client::Tgi), loads(Client::Vllm));
    let example = branches.get(1).unwrap_or(&branches[0]).name.clone();
    let mut branches = branches;
    for branch in &mut branches {
        branch.loads = shown.iter().map(|at| branch.loads[*at]).collect();
    }
    Ok(Facts {
        user: user.to_owned(),
        title: title.to_owned(),
        repo: settings.repo.clone(),
        base_name: model.rsplit('/').next().unwrap_or(model).to_owned(),
        front: front(&Front {
            base_model: base_model.as_deref(),
            base: base.as_ref(),
            license: &license,
            language: settings.language.as_deref(),
            model_type,
            user,
            dataset: calibrated.as_deref(),
            matrix,
        }),
        base_model,
        license,
        model_type: model_type.to_owned(),
        context: first.config["max_position_embeddings"].as_u64(),
        prompt_name: settings.prompt.name.clone(),
        prompt: settings.prompt.text.trim_end().to_owned(),
        prompt_python: settings
            .prompt
            .text
            .replace('\\', "\\\\")
            .replace("\"\"\"", "\\\"\\\"\\\""),
        prompt_own: settings.prompt.own,
        example,
        tgi,
        vllm,
        dtype: dtype.to_owned(),
        format: format.name(),
        clients: shown.iter().map(|at| Client::ALL[*at].name()).collect(),
        tried: shown
            .iter()
            .map(|at| Client::ALL[*at].tried(format))
            .collect(),
        measured_on,
        tasks,
        gptq_version: first.report.gptq_version.clone(),
        base_card: base.map(|b| b.body).filter(|body| !body.is_empty()),
        branches,
    })
}

impl Facts {
    /// Returns the branches that failed `gptq verify`, with the failed checks.
    pub fn failures(&self) -> Vec<(&str, &str)> {
        let branches = self.branches.iter();
        branches
            .filter_map(|b| Some((b.name.as_str(), b.failure.as_deref()?)))
            .collect()
    }

    /// Returns the missing entries of the front matter, and the options that add them.
    pub fn missing(&self) -> Vec<(&'static str, &'static str)> {
        let has = |key: &str| self.front.iter().any(|e| e.starts_with(&format!("{key}:")));
        [
            ("base_model", "--base-model"),
            ("license", "--license"),
            ("language", "--language"),
            ("datasets", "--dataset"),
        ]
        .into_iter()
        .filter(|(key, _)| !has(key) || (*key == "license" && self.license == "unknown"))
        .collect()
    }
}

/// Renders the card with `template` (its name and text), or with the built-in one.
///
/// # Errors
/// A template that does not parse or uses an unknown variable.
pub fn card(facts: &Facts, template: Option<(&str, &str)>) -> Result<String, ReportError> {
    let (name, text) = template.unwrap_or(("card.md", TEMPLATE));
    let failed = |source| ReportError::Template {
        template: name.to_owned(),
        source,
    };
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_syntax(
        SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .keep_trailing_newline(true)
            .build()
            .expect("Jinja's own delimiters"),
    );
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.add_template(name, text).map_err(failed)?;
    let template = environment.get_template(name).map_err(failed)?;
    template.render(Serde(facts)).map_err(failed)
}

/// Splits `user/name`, both of characters that the Hub allows.
fn repository(repo: &str) -> Result<(&str, &str), ReportError> {
    let valid = |part: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        !part.is_empty() && part.chars().all(allowed)
    };
    match repo.split_once('/') {
        Some((user, name)) if valid(user) && valid(name) => Ok((user, name)),
        _ => Err(ReportError::Repository {
            repo: repo.to_owned(),
        }),
    }
}

/// Returns the name if it has the form of a Hub id.
fn hub_id(name: &str) -> Option<String> {
    repository(name).ok().map(|_| name.to_owned())
}

struct Front<'a> {
    base_model: Option<&'a str>,
    base: Option<&'a BaseCard>,
    license: &'a str,
    language: Option<&'a str>,
    model_type: &'a str,
    user: &'a str,
    dataset: Option<&'a str>,
    matrix: &'a Matrix,
}

/// Returns the front matter's entries; values are quoted as in JSON, which is valid YAML.
fn front(known: &Front<'_>) -> Vec<String> {
    let quoted = |value: &str| serde_json::Value::from(value).to_string();
    let scalar = |key: &str, value: &str| format!("{key}: {}", quoted(value));
    let list = |key: &str, values: &[&str]| {
        let items = values.iter().map(|value| format!("\n- {}", quoted(value)));
        format!("{key}:{}", items.collect::<String>())
    };
    let from_base = |key: &str| known.base.and_then(|base| base.entry(key));
    let mut entries = Vec::new();
    entries.extend(known.base_model.map(|id| scalar("base_model", id)));
    entries.push(scalar("license", known.license));
    entries.extend(from_base("license_name"));
    entries.extend(from_base("license_link"));
    entries.extend(match known.language {
        Some(code) => Some(list("language", &[code])),
        None => from_base("language"),
    });
    entries.push(scalar("model_type", known.model_type));
    entries.push(scalar("quantized_by", known.user));
    entries.extend(known.dataset.map(|id| list("datasets", &[id])));
    entries.push(scalar("library_name", "transformers"));
    entries.push(scalar("pipeline_tag", "text-generation"));
    entries.push("inference: false".to_owned());
    let branches = known.matrix.branches.iter();
    let mut bits: Vec<Bits> = branches
        .flat_map(|b| &b.report.linears)
        .map(|l| l.bits)
        .collect();
    bits.sort();
    bits.dedup();
    let bits: Vec<String> = bits.into_iter().map(|b| format!("{b}-bit")).collect();
    let tags: Vec<&str> = ["gptq"]
        .into_iter()
        .chain(bits.iter().map(String::as_str))
        .collect();
    entries.push(list("tags", &tags));
    entries
}

impl BranchFacts {
    fn new(
        branch: &Branch,
        windows: &[Windows],
        tasks: &[Accuracy],
        settings: &CardSettings,
    ) -> BranchFacts {
        let report = &branch.report;
        let config = &report.quantize_config;
        let perplexity = |windows: &Windows| {
            let it = branch.measured_on(windows)?;
            let over = it
                .dense_perplexity
                .map(|dense| number::over(it.perplexity, dense));
            let over = over.map_or_else(String::new, |over| format!(" ({over})"));
            Some(format!("{:.3}{over}", it.perplexity))
        };
        let accuracy = |task: &Accuracy| {
            let it = branch.accuracy_on(task)?;
            let over = it.over().map(|over| format!(" ({over})"));
            Some(format!("{}{}", it.percent(), over.unwrap_or_default()))
        };
        let source = &report.calibration.source;
        let dataset = settings.dataset.as_ref().unwrap_or(source);
        let clients = branch.clients();
        let loads = Client::ALL.map(|client| {
            let support = clients.iter().find(|s| s.client == client);
            support.and_then(|s| s.verdict.err())
        });
        BranchFacts {
            name: cell(&report.branch),
            bits: match branch.mixed() {
                true => "mixed".to_owned(),
                false => config.bits.to_string(),
            },
            group_size: match config.group_size {
                _ if branch.mixed() => "mixed".to_owned(),
                GroupSize::Row => "none".to_owned(),
                GroupSize::Columns(n) => n.to_string(),
            },
            act_order: report.solved().act_order,
            order: report.order().cell(),
            damp_percent: report.solved().damp_percent,
            dataset: match hub_id(dataset) {
                Some(id) => format!("[{id}](https://huggingface.co/datasets/{id})"),
                None => cell(dataset),
            },
            samples: report.calibration.samples,
            seq_len: report.calibration.seq_len,
            size: number::decimal_size(branch.bytes),
            exllama: clients
                .iter()
                .any(|s| s.client == Client::ExLlama && s.verdict.is_ok()),
            description: description(branch),
            perplexities: windows.iter().map(perplexity).collect(),
            accuracies: tasks.iter().map(accuracy).collect(),
            failure: branch.failure().map(|failure| cell(&failure)),
            loads: loads.to_vec(),
        }
    }
}

/// Escapes text for a cell of a Markdown table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace(['\r', '\n'], " ")
}
