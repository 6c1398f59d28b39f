//! Parses a cell as a conversation: messages in the form that chat templates expect, `{role,
//! content}`, with keys in their original order. Content is a string or a list of text parts. The
//! input has that form or ShareGPT's, `{from, value}`. Other keys, such as `tool_calls`, are kept
//! for templates that use them. As in Transformers, a key with a null value is ignored: columnar
//! files give every message every key.

use crate::json::kind;
use crate::value::{Map, Value};

/// ShareGPT's role names, and those that templates use.
const ROLES: [(&str, &str); 5] = [
    ("human", "user"),
    ("gpt", "assistant"),
    ("chatgpt", "assistant"),
    ("bing", "assistant"),
    ("bard", "assistant"),
];

/// Parses the messages of a cell. The error describes what was found instead.
pub(crate) fn messages(cell: &Value) -> Result<Vec<Map>, String> {
    let list = cell.as_array();
    let list = list.ok_or_else(|| format!("it is {}, not a list", kind(cell)))?;
    if list.is_empty() {
        return Err("it is a list without a message".into());
    }
    let numbered = list.iter().enumerate();
    numbered
        .map(|(i, value)| message(value).map_err(|why| format!("message {i} {why}")))
        .collect()
}

fn message(value: &Value) -> Result<Map, String> {
    let keys = value.as_object();
    let keys = keys.ok_or_else(|| format!("is {}", kind(value)))?;
    let has = |key: &str| keys.get(key).is_some_and(|value| !value.is_null());
    let share_gpt = !has("role") && has("from");
    if !share_gpt && !has("role") {
        return Err("has neither role nor from".into());
    }
    let said = if share_gpt { "value" } else { "content" };
    if !has(said) && !keys.contains_key(said) && !has("tool_calls") {
        return Err(format!("has no {said}"));
    }
    let mut message = Map::new();
    for (key, value) in keys.iter().filter(|(_, value)| !value.is_null()) {
        let key = match (share_gpt, key.as_str()) {
            (true, "from") => "role",
            (true, "value") => "content",
            (_, key) => key,
        };
        let value = match key {
            "role" => role(value, share_gpt)?,
            "content" => content(value)?,
            _ => value.clone(),
        };
        message.insert(key.to_owned(), value);
    }
    Ok(message)
}

fn role(role: &Value, share_gpt: bool) -> Result<Value, String> {
    let name = role.as_str();
    let name = name.ok_or_else(|| format!("has a role that is {}", kind(role)))?;
    let known = ROLES.iter().find(|(from, _)| share_gpt && *from == name);
    Ok(known.map_or(name, |(_, known)| known).into())
}

fn content(content: &Value) -> Result<Value, String> {
    match content {
        Value::String(_) => {}
        Value::Array(parts) => parts.iter().try_for_each(part)?,
        other => return Err(format!("has content that is {}", kind(other))),
    }
    Ok(content.clone())
}

fn part(part: &Value) -> Result<(), String> {
    match part["type"].as_str() {
        Some("text") => match part["text"].as_str() {
            Some(_) => Ok(()),
            None => Err("has a part of type \"text\" without a text".into()),
        },
        Some(other) => Err(format!("has a part of type {other:?}, which is not text")),
        None => Err("has a part without a type".into()),
    }
}

/// Parses the tools of a row: a list of objects, or JSON of one. The error describes what was found
/// instead.
pub(crate) fn tools(cell: &Value) -> Result<Value, String> {
    let parsed = match cell.as_str() {
        Some(text) => {
            let parsed = serde_json::from_str(text);
            parsed.map_err(|error| format!("it is a text that is not JSON: {error}"))?
        }
        None => cell.clone(),
    };
    // Some data sets store each tool as JSON, so that a columnar file can hold tools with different
    // keys.
    let tool = |tool: Value| match &tool {
        Value::String(text) => serde_json::from_str(text).unwrap_or(tool),
        _ => tool,
    };
    let tools: Vec<Value> = match parsed {
        Value::Array(tools) => tools.into_iter().map(tool).collect(),
        Value::Null => return Ok(Value::Null),
        other => return Err(format!("it is {}, not a list of tools", kind(&other))),
    };
    match tools.iter().find(|tool| tool.as_object().is_none()) {
        Some(other) => Err(format!("it has a tool that is {}", kind(other))),
        None => Ok(Value::Array(tools)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_form_of_a_message_becomes_role_and_content() {
        let share_gpt = ["system", "human", "user", "gpt", "chatgpt", "bing", "tool"];
        let share_gpt = share_gpt.map(|from| json!({"from": from, "value": "Hi", "weight": null}));
        let found = messages(&Value::from(share_gpt.to_vec())).unwrap();
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
        let hi = Value::from(json!({"role": "user", "content": "Hi"}));
        assert_eq!(found[1], *hi.as_object().unwrap());

        let calls = json!([{"function": {"name": "f", "arguments": {"a": 1, "b": null}}}]);
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let talk = json!([
            {"role": "human", "content": parts},
            {"role": "assistant", "content": null, "tool_calls": calls},
            {"role": "tool", "content": "", "name": "f", "tool_calls": null},
        ]);
        let expected = json!([
            {"role": "human", "content": parts},
            {"role": "assistant", "tool_calls": calls},
            {"role": "tool", "content": "", "name": "f"},
        ]);
        assert_eq!(Value::from(messages(&talk.into()).unwrap()), expected);
    }

    #[test]
    fn the_keys_of_a_message_keep_their_order() {
        let cell = r#"[{"value": "Hi", "z": 1, "from": "human", "a": {"y": 1, "b": 2}}]"#;
        let cell: Value = serde_json::from_str(cell).unwrap();
        let found = Value::from(messages(&cell).unwrap()).to_string();
        let expected = r#"[{"content":"Hi","z":1,"role":"user","a":{"y":1,"b":2}}]"#;
        assert_eq!(found, expected);
    }

    #[test]
    fn tools_are_a_list_or_json_of_one() {
        let list = Value::from(json!([{"type": "function"}]));
        assert_eq!(tools(&list).unwrap(), list);
        assert_eq!(tools(&r#"[{"type": "function"}]"#.into()).unwrap(), list);
        let texts = Value::from(vec![r#"{"type": "function"}"#]);
        assert_eq!(tools(&texts).unwrap(), list);
        assert_eq!(tools(&"null".into()).unwrap(), Value::Null);
        for (cell, words) in [
            (json!("get_time"), "not JSON"),
            (json!({"a": 1}), "an object, not a list"),
            (json!([1]), "a tool that is a number"),
            (json!(["get_time"]), "a tool that is a text"),
        ] {
            let why = tools(&cell.clone().into()).unwrap_err();
            assert!(why.contains(words), "{cell}: {why}");
        }
    }

    #[test]
    fn what_is_no_message_is_named() {
        for (cell, words) in [
            (json!("Hi"), "it is a text, not a list"),
            (json!([]), "a list without a message"),
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
            let why = messages(&cell.clone().into()).unwrap_err();
            assert!(why.contains(words), "{cell}: {why}");
        }
    }
}
