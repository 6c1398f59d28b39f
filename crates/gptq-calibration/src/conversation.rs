//! A cell as a conversation: its messages in the form that chat templates know, `{role, content}`
//! with text for content. They come in that form, with content in parts or null, or in ShareGPT's,
//! `{from, value}`. Other keys, such as `tool_calls`, go along for templates that ask for them.

use serde_json::{Map, Value};

use crate::json::kind;

/// ShareGPT's names of roles that templates have others for.
const ROLES: [(&str, &str); 5] = [
    ("human", "user"),
    ("gpt", "assistant"),
    ("chatgpt", "assistant"),
    ("bing", "assistant"),
    ("bard", "assistant"),
];

/// The messages of a cell. The error says what was found instead.
pub(crate) fn messages(cell: &Value) -> Result<Vec<Value>, String> {
    let list = cell.as_array();
    let list = list.ok_or_else(|| format!("it is {}, not a list", kind(cell)))?;
    let numbered = list.iter().enumerate();
    numbered
        .map(|(i, value)| message(value).map_err(|why| format!("message {i} {why}")))
        .collect()
}

fn message(value: &Value) -> Result<Value, String> {
    let keys = value.as_object();
    let keys = keys.ok_or_else(|| format!("is {}", kind(value)))?;
    // Files stored by columns give every message every key, null where it has none, and templates
    // ask whether a key is there.
    let present = keys.iter().filter(|(_, value)| !value.is_null());
    let mut message: Map<String, Value> = present.map(|(k, v)| (k.clone(), v.clone())).collect();
    let (role, said) = match message.remove("role") {
        Some(role) => (role, "content"),
        None => match message.remove("from") {
            Some(from) => (from, "value"),
            None => return Err("has neither role nor from".into()),
        },
    };
    let Value::String(mut role) = role else {
        return Err(format!("has a role that is {}", kind(&role)));
    };
    if said == "value"
        && let Some((_, name)) = ROLES.iter().find(|(from, _)| *from == role)
    {
        role = (*name).to_owned();
    }
    let content = match message.remove(said) {
        Some(content) => text(content)?,
        // Null, as of an assistant that calls a tool.
        None if keys.contains_key(said) || message.contains_key("tool_calls") => String::new(),
        None => return Err(format!("has no {said}")),
    };
    message.insert("role".into(), role.into());
    message.insert("content".into(), content.into());
    Ok(Value::Object(message))
}

/// Content as text: parts are joined.
fn text(content: Value) -> Result<String, String> {
    match content {
        Value::String(text) => Ok(text),
        Value::Array(parts) => parts.iter().map(part).collect(),
        other => Err(format!("has content that is {}", kind(&other))),
    }
}

fn part(part: &Value) -> Result<&str, String> {
    match part.get("type").and_then(Value::as_str) {
        Some("text") => {
            let text = part.get("text").and_then(Value::as_str);
            text.ok_or_else(|| "has a part of type \"text\" without a text".into())
        }
        Some(other) => Err(format!("has a part of type {other:?}, which is no text")),
        None => Err("has a part without a type".into()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_form_of_a_message_becomes_role_and_text() {
        let share_gpt = ["system", "human", "user", "gpt", "chatgpt", "bing", "tool"];
        let share_gpt = share_gpt.map(|from| json!({"from": from, "value": "Hi", "weight": null}));
        let found = messages(&share_gpt.to_vec().into()).unwrap();
        let roles: Vec<&str> = found.iter().map(|m| m["role"].as_str().unwrap()).collect();
        assert_eq!(
            roles,
            [
                "system",
                "user",
                "user",
                "assistant",
                "assistant",
                "assistant",
                "tool"
            ]
        );
        assert_eq!(found[1], json!({"role": "user", "content": "Hi"}));

        let calls = json!([{"function": {"name": "f", "arguments": {"a": 1}}}]);
        let talk = json!([
            {"role": "human", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": null, "tool_calls": calls},
            {"role": "tool", "content": "", "name": "f", "tool_calls": null},
        ]);
        let expected = json!([
            {"role": "human", "content": "ab"},
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "content": "", "name": "f"},
        ]);
        assert_eq!(Value::Array(messages(&talk).unwrap()), expected);
    }

    #[test]
    fn what_is_no_message_is_named() {
        for (cell, words) in [
            (json!("Hi"), "it is a text, not a list"),
            (json!(["Hi"]), "message 0 is a text"),
            (
                json!([{"role": "user", "content": "a"}, {"text": "a"}]),
                "message 1 has neither",
            ),
            (
                json!([{"role": 1, "content": "a"}]),
                "a role that is a number",
            ),
            (json!([{"role": "user"}]), "has no content"),
            (json!([{"from": "human"}]), "has no value"),
            (
                json!([{"role": "user", "content": {"a": 1}}]),
                "content that is an object",
            ),
            (
                json!([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
                "a part of type \"image_url\"",
            ),
        ] {
            let why = messages(&cell).unwrap_err();
            assert!(why.contains(words), "{cell}: {why}");
        }
    }
}
