//! Chat templates, which turn messages into the text format a model was trained on.
//!
//! A template is Jinja as Transformers renders it (`apply_chat_template`): blocks swallow their own
//! line, `break` and `continue` work, values are written as Python writes them, `tojson` is
//! `json.dumps`, `{% generation %}` and `strftime_now` are supported, and `raise_exception` ends
//! the rendering with a message. Templates come with checkpoints from anyone, so their length
//! ([`MAX_TEMPLATE`]) and their work ([`jinja`]) are limited.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use minijinja::Value as JinjaValue;
use minijinja::value::Serde;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::CalibrationError;
use crate::jinja::{self, Jinja, Objection};
use crate::small_file::{self, MAX_TEMPLATE};
use crate::value::{Map, Value};

/// ChatML: each message between `<|im_start|>role` and `<|im_end|>`.
const CHATML: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n\
                      {% if message.content is string %}{{ message.content }}{% else %}\
                      {% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}\
                      <|im_end|>\n{% endfor %}\
                      {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// Tokens that templates know by name.
const SPECIAL_TOKENS: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// Keys of a message that hold its reasoning; most templates read the first.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Directory of a checkpoint's further templates, beside the one in `chat_template.jinja`.
const MORE_TEMPLATES: &str = "additional_chat_templates";

/// Name of the template for conversations with tools.
const TOOL_USE: &str = "tool_use";

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// "system", "user" or "assistant".
    pub role: String,
    /// Text of the turn.
    pub content: String,
}

impl Message {
    /// Makes a turn.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Message {
            role: role.into(),
            content: content.into(),
        }
    }
}

/// Template that writes a conversation for a model.
#[derive(Debug)]
pub struct ChatTemplate {
    default: Option<Named>,
    /// Template for conversations with tools, if there is one.
    tool_use: Option<Named>,
    special: BTreeMap<&'static str, String>,
    complete: bool,
    /// Date that `strftime_now` returns.
    date: String,
}

/// A compiled template and its origin.
#[derive(Debug)]
struct Named {
    origin: String,
    jinja: Jinja,
}

impl Named {
    fn new(origin: impl Into<String>, source: &str) -> Result<Self, CalibrationError> {
        let origin = origin.into();
        if source.len() as u64 > MAX_TEMPLATE {
            return Err(CalibrationError::ChatTemplate {
                template: origin,
                line: 0,
                reason: format!("over the limit of {MAX_TEMPLATE} bytes"),
            });
        }
        match Jinja::new(source) {
            Ok(jinja) => Ok(Named { origin, jinja }),
            Err(objection) => Err(objects(&origin, objection)),
        }
    }
}

fn objects(origin: &str, objection: Objection) -> CalibrationError {
    CalibrationError::ChatTemplate {
        template: origin.to_owned(),
        line: objection.line,
        reason: objection.reason,
    }
}

impl ChatTemplate {
    /// Returns the built-in ChatML template.
    #[expect(
        clippy::expect_used,
        reason = "the template is a constant, and a test parses it"
    )]
    pub fn chatml() -> Self {
        let built_in = Named::new("the built-in ChatML", CHATML);
        ChatTemplate {
            default: Some(built_in.expect("the built-in template parses")),
            tool_use: None,
            special: BTreeMap::new(),
            complete: false,
            date: jinja::now(),
        }
    }

    /// Loads the template of the tokenizer in `dir`: `chat_template.jinja` and, for conversations
    /// with tools, `additional_chat_templates/tool_use.jinja`; without such files, `chat_template`
    /// in `tokenizer_config.json` (a string, or several by name, of which "default" and "tool_use"
    /// are used). `None` if there is neither. Its date is the current time.
    ///
    /// # Errors
    /// A file that cannot be read, or a template that does not parse.
    pub fn of(dir: &Path) -> Result<Option<Self>, CalibrationError> {
        let config = small_file::config(dir, "tokenizer_config.json")?;
        let read = |path: PathBuf| match small_file::read(&path, MAX_TEMPLATE) {
            Ok(bytes) => match String::from_utf8(bytes) {
                Ok(source) => Named::new(path.to_string_lossy(), &source).map(Some),
                Err(_) => Err(CalibrationError::Malformed {
                    path,
                    reason: "not UTF-8 text".into(),
                }),
            },
            Err(error) if error.is_missing_file() => Ok(None),
            Err(error) => Err(error),
        };
        let more = dir.join(MORE_TEMPLATES);
        let mut default = read(dir.join("chat_template.jinja"))?;
        let mut tool_use = read(more.join(format!("{TOOL_USE}.jinja")))?;
        // Template files take precedence over the configuration, even if none of them is the
        // default.
        if default.is_none() && tool_use.is_none() && !holds_templates(&more) {
            // The reported line is one of the template, not of the file that holds it.
            let file = dir.join("tokenizer_config.json");
            let origin = format!("{}: chat template", file.display());
            let named = |name| match config
                .get("chat_template")
                .and_then(|given| source(given, name))
            {
                Some(source) => Named::new(origin.as_str(), source).map(Some),
                None => Ok(None),
            };
            (default, tool_use) = (named("default")?, named(TOOL_USE)?);
        }
        if default.is_none() && tool_use.is_none() {
            return Ok(None);
        }
        let older = small_file::config(dir, "special_tokens_map.json")?;
        let special = SPECIAL_TOKENS.into_iter().filter_map(|name| {
            let token = |config: &Json| special_token(config.get(name)?);
            Some((name, token(&config).or_else(|| token(&older))?))
        });
        Ok(Some(ChatTemplate {
            default,
            tool_use,
            special: special.collect(),
            complete: true,
            date: jinja::now(),
        }))
    }

    /// Returns the template with another date, `2026-11-30` or `2026-11-30T08:15:00`.
    #[must_use]
    pub fn dated(self, date: &str) -> Self {
        ChatTemplate {
            date: date.to_owned(),
            ..self
        }
    }

    /// Returns the date that templates see.
    pub fn date(&self) -> &str {
        &self.date
    }

    /// Returns true if a template asked for the date since the last call.
    pub(crate) fn asked_for_date(&self) -> bool {
        let templates = [&self.default, &self.tool_use].into_iter().flatten();
        // Queries every template, as a query resets its flag.
        templates.filter(|it| it.jinja.asked_for_date()).count() > 0
    }

    /// Returns true if the rendered text contains every special token, as with a tokenizer's own
    /// template, and must be encoded without adding any. The built-in template leaves them to the
    /// tokenizer.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// Returns the text that ends a turn, for tokenizers that do not know it as a token: the
    /// built-in template's `<|im_end|>`.
    pub fn end_of_turn(&self) -> Option<&'static str> {
        (!self.complete).then_some("<|im_end|>")
    }

    /// Renders the conversation, optionally with the opening of the assistant's next turn.
    ///
    /// # Errors
    /// Errors raised by the template, such as roles out of turn.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, CalibrationError> {
        let text = |text: &String| Value::String(text.clone());
        let message = |message: &Message| {
            let keys = [("role", &message.role), ("content", &message.content)];
            keys.into_iter()
                .map(|(key, value)| (key.to_owned(), text(value)))
                .collect()
        };
        let messages: Vec<Map> = messages.iter().map(message).collect();
        self.write(&messages, &Value::Null, add_generation_prompt)
    }

    /// Renders messages with any keys, and tools unless they are null; see [`Self::render`].
    pub(crate) fn write(
        &self,
        messages: &[Map],
        tools: &Value,
        add_generation_prompt: bool,
    ) -> Result<String, CalibrationError> {
        let with_tools = self.tool_use.as_ref().filter(|_| !tools.is_null());
        let template = with_tools.or(self.default.as_ref());
        let template = template.ok_or(CalibrationError::NoChatTemplate)?;
        let messages = messages.iter().map(with_reasoning).map(Value::Object);
        let messages: Vec<Value> = messages.collect();
        let special = self.special.iter();
        let mut values: BTreeMap<&'static str, JinjaValue> = special
            .map(|(name, token)| (*name, token.as_str().into()))
            .collect();
        values.insert("messages", Serde(messages).into());
        values.insert("tools", Serde(tools).into());
        values.insert("documents", ().into());
        values.insert("add_generation_prompt", add_generation_prompt.into());
        let rendered = template.jinja.render(values, &self.date);
        rendered.map_err(|objection| objects(&template.origin, objection))
    }
}

/// Copies the message's reasoning to every key that templates read, as Transformers does.
fn with_reasoning(message: &Map) -> Map {
    let Some(reasoning) = REASONING.iter().find_map(|key| message.get(*key)) else {
        return message.clone();
    };
    let mut all = Map::new();
    all.insert("thinking".into(), reasoning.clone());
    all.extend(message.clone());
    all.insert("reasoning_content".into(), reasoning.clone());
    all
}

/// Returns true if a directory holds a file named like a template.
fn holds_templates(dir: &Path) -> bool {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut paths = entries.map(|entry| entry.path());
    paths.any(|path| {
        path.extension()
            .is_some_and(|extension| extension == "jinja")
    })
}

/// Returns a single template, which is the default, or the one called `name` of several.
fn source<'v>(value: &'v Json, name: &str) -> Option<&'v str> {
    match value {
        Json::String(text) => Some(text.as_str()).filter(|_| name == "default"),
        Json::Array(list) => {
            let named = |entry: &&Json| entry.get("name").is_some_and(|given| given == name);
            let named = list.iter().find(named);
            named?.get("template")?.as_str()
        }
        several => several.get(name)?.as_str(),
    }
}

/// Returns a special token of `tokenizer_config.json`: a string, or an object with `content`.
pub(crate) fn special_token(value: &Json) -> Option<String> {
    let text = value.as_str().or_else(|| value.get("content")?.as_str());
    text.map(str::to_owned)
}

#[cfg(test)]
mod golden;

#[cfg(test)]
mod tests {
    use super::*;

    fn talk() -> Vec<Message> {
        vec![
            Message::new("system", "Be brief."),
            Message::new("user", "What is asthma? "),
        ]
    }

    fn own(source: &str) -> Result<ChatTemplate, CalibrationError> {
        let dir = tempfile::tempdir().unwrap();
        let config = serde_json::json!({
            "bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": source,
        });
        fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        Ok(ChatTemplate::of(dir.path())?.expect("it has one"))
    }

    #[test]
    fn chatml_marks_every_turn_and_opens_the_next() {
        let open = "<|im_start|>system\nBe brief.<|im_end|>\n\
                    <|im_start|>user\nWhat is asthma? <|im_end|>\n";
        let template = ChatTemplate::chatml();
        assert_eq!(template.render(&talk(), false).unwrap(), open);
        let prompt = template.render(&talk(), true).unwrap();
        assert_eq!(prompt, format!("{open}<|im_start|>assistant\n"));
    }

    #[test]
    fn a_tokenizer_s_own_template_has_its_tokens_and_python_s_strings() {
        let template = own(
            "{%- for message in messages[1:] %}\n  {% if message['role'] == 'user' %}\n\
             {{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' + eos_token }}\n  \
             {% endif %}\n{% endfor %}",
        )
        .unwrap();
        assert!(template.is_complete());
        let text = template.render(&talk(), true).unwrap();
        assert_eq!(text, "<s>[INST] What is asthma? [/INST]</s>\n");
    }

    #[test]
    fn templates_render_as_in_transformers() {
        let golden: std::path::PathBuf = [
            env!("CARGO_MANIFEST_DIR"),
            "../../tests/golden/generate.json",
        ]
        .iter()
        .collect();
        let golden: serde_json::Value = serde_json::from_slice(&fs::read(golden).unwrap()).unwrap();
        let talk: Vec<Message> =
            serde_json::from_value(golden["chat"]["messages"].clone()).unwrap();
        let cases = golden["chat"]["templates"].as_array().unwrap();
        assert_eq!(cases.len(), 6);
        for case in cases {
            let prompt = case["add_generation_prompt"].as_bool().unwrap();
            let template = own(case["template"].as_str().unwrap()).unwrap();
            let text = template.render(&talk, prompt).unwrap();
            assert_eq!(text, case["text"].as_str().unwrap());
            if case["name"] == "chatml" {
                assert_eq!(ChatTemplate::chatml().render(&talk, prompt).unwrap(), text);
            }
        }
    }

    #[test]
    fn a_template_s_own_objection_and_its_mistakes_are_told() {
        let error = |source: &str| match own(source) {
            Ok(template) => template.render(&talk(), true).unwrap_err().to_string(),
            Err(error) => error.to_string(),
        };
        assert!(error("{{ raise_exception('roles must alternate') }}").contains("must alternate"));
        assert!(
            error("\n{% if %}").contains("line 2"),
            "{}",
            error("\n{% if %}")
        );
        let endless =
            "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}";
        assert!(error(endless).contains("fuel"), "{}", error(endless));
    }

    #[test]
    fn a_tokenizer_without_a_template_has_none() {
        let dir = tempfile::tempdir().unwrap();
        assert!(ChatTemplate::of(dir.path()).unwrap().is_none());
    }
}
