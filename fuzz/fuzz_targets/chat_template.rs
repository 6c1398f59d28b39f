//! Any bytes as `tokenizer_config.json` with its special tokens and chat template; input that does
//! not look like JSON is used as `chat_template.jinja`.
#![no_main]

use gptq_calibration::{ChatTemplate, Message};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    gptq_fuzz::panics_may_be_caught();
    let name = match bytes.first() {
        Some(b'{') if bytes.get(1) != Some(&b'%') && bytes.get(1) != Some(&b'{') => {
            "tokenizer_config.json"
        }
        _ => "chat_template.jinja",
    };
    gptq_fuzz::with_files(&[(name, bytes)], |dir| {
        let Ok(Some(template)) = ChatTemplate::of(dir) else {
            return;
        };
        let talk = [
            Message::new("system", "Be brief."),
            Message::new("user", "What is asthma? "),
        ];
        for prompt in [false, true] {
            let _ = template.render(&talk, prompt);
        }
    });
});
