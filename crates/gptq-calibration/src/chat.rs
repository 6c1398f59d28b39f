//! Chat templates: messages as the one text a model was trained on.
//!
//! A template is Jinja as Transformers renders it (`apply_chat_template`): blocks swallow their own
//! line, `break` and `continue` work, strings have Python's methods, and `raise_exception` ends the
//! rendering with a message. It comes from a checkpoint, so its length ([`MAX_TEMPLATE`]) and what it can
//! do ([`jinja`]) are limited.

use std::collections::BTreeMap;
use std::path::Path;

use minijinja::value::Serde;
use minijinja::{Environment, context};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::CalibrationError;
use crate::jinja;
use crate::small_file::{self, MAX_TEMPLATE};

/// ChatML: each message between `<|im_start|>role` and `<|im_end|>`.
const CHATML: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n\
                      {{ message.content }}<|im_end|>\n{% endfor %}\
                      {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// "system", "user" or "assistant".
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A turn.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Message {
            role: role.into(),
            content: content.into(),
        }
    }
}

/// How a conversation is written for a model.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token`, `eos_token` and the others a template may name.
    special: BTreeMap<String, String>,
    complete: bool,
}

impl ChatTemplate {
    /// The built-in ChatML.
    #[expect(
        clippy::expect_used,
        reason = "the template is a constant, and a test parses it"
    )]
    pub fn chatml() -> Self {
        ChatTemplate::parse(CHATML, BTreeMap::new(), false).expect("the built-in template parses")
    }

    /// The template that the tokenizer in `dir` has: `chat_template.jinja`, else `chat_template` in
    /// `tokenizer_config.json` (a text, or a list whose "default" counts). `None` where there is
    /// neither.
    ///
    /// # Errors
    /// A file that cannot be read, or a template that does not parse.
    pub fn of(dir: &Path) -> Result<Option<Self>, CalibrationError> {
        let config = small_file::config(dir, "tokenizer_config.json")?;
        let own = dir.join("chat_template.jinja");
        let source = match small_file::read(&own, MAX_TEMPLATE) {
            Ok(bytes) => {
                Some(
                    String::from_utf8(bytes).map_err(|_| CalibrationError::Malformed {
                        path: own,
                        reason: "not UTF-8 text".into(),
                    })?,
                )
            }
            Err(error) if error.is_missing_file() => config.get("chat_template").and_then(named),
            Err(error) => return Err(error),
        };
        let special = ["bos_token", "eos_token", "unk_token", "pad_token"]
            .into_iter()
            .filter_map(|name| Some((name.to_owned(), special_token(config.get(name)?)?)))
            .collect();
        source
            .map(|source| ChatTemplate::parse(&source, special, true))
            .transpose()
    }

    fn parse(
        source: &str,
        special: BTreeMap<String, String>,
        complete: bool,
    ) -> Result<Self, CalibrationError> {
        if source.len() as u64 > MAX_TEMPLATE {
            return Err(CalibrationError::ChatTemplate {
                line: 0,
                reason: format!("over the limit of {MAX_TEMPLATE} bytes"),
            });
        }
        Ok(ChatTemplate {
            environment: jinja::environment("chat", source)?,
            special,
            complete,
        })
    }

    /// Whether the rendered text holds every special token, as a tokenizer's own template does:
    /// encode it without adding any. The built-in leaves them to the tokenizer.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// What ends a turn as text, for models whose tokenizers do not know it as a token: the
    /// built-in's `<|im_end|>`.
    pub fn end_of_turn(&self) -> Option<&'static str> {
        (!self.complete).then_some("<|im_end|>")
    }

    /// The conversation as text, with the opening of the assistant's next turn if asked for. Its
    /// messages are [`Message`]s, or objects with more keys than those.
    ///
    /// # Errors
    /// What the template itself refuses, such as roles out of turn.
    pub fn render(
        &self,
        messages: &[impl Serialize + Sync],
        add_generation_prompt: bool,
    ) -> Result<String, CalibrationError> {
        let messages = Serde(messages);
        let special = minijinja::Value::from(Serde(&self.special));
        jinja::on_its_own_stack(|| {
            let chat = self.environment.get_template("chat")?;
            chat.render(context! { messages, add_generation_prompt, ..special })
        })
    }
}

/// A template by itself, or the one called "default" of several.
fn named(value: &Value) -> Option<String> {
    let default = |list: &Vec<Value>| {
        let is_default = |entry: &&Value| entry.get("name").is_some_and(|name| name == "default");
        let entry = list.iter().find(is_default)?;
        entry.get("template")?.as_str().map(str::to_owned)
    };
    match value {
        Value::Array(list) => default(list),
        other => other.as_str().map(str::to_owned),
    }
}

/// A special token of `tokenizer_config.json`: a string, or an object with `content`.
pub(crate) fn special_token(value: &Value) -> Option<String> {
    let text = value.as_str().or_else(|| value.get("content")?.as_str());
    text.map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use std::fs;

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
        let golden: Value = serde_json::from_slice(&fs::read(golden).unwrap()).unwrap();
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
    fn a_panic_of_the_template_library_is_a_refusal() {
        let template = own("{{ '{a[b\u{6ce}'.format(0) }}").unwrap();
        let error = template.render(&talk(), true).unwrap_err().to_string();
        assert!(error.contains("cannot read it"), "{error}");
    }

    #[test]
    fn a_tokenizer_without_a_template_has_none() {
        let dir = tempfile::tempdir().unwrap();
        assert!(ChatTemplate::of(dir.path()).unwrap().is_none());
    }
}
