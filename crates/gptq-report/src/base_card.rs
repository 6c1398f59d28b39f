//! The base model's own card: YAML front matter between `---` lines, then Markdown.

/// A card split into front matter and body.
#[derive(Default)]
pub(crate) struct BaseCard {
    front: String,
    /// The Markdown behind the front matter.
    pub body: String,
}

impl BaseCard {
    pub(crate) fn parse(text: &str) -> BaseCard {
        let text = text.trim_start_matches('\u{feff}').replace("\r\n", "\n");
        let parts = text
            .strip_prefix("---\n")
            .and_then(|rest| rest.split_once("\n---"));
        match parts {
            Some((front, body)) => BaseCard {
                front: front.to_owned(),
                body: body.trim().to_owned(),
            },
            None => BaseCard {
                front: String::new(),
                body: text.trim().to_owned(),
            },
        }
    }

    /// Returns a top-level key with its value as written: `"license: llama2"`, or `"language:"` and
    /// the lines of its list.
    pub(crate) fn entry(&self, key: &str) -> Option<String> {
        let mut lines = self.front.lines();
        let first = lines.find(|line| {
            line.strip_prefix(key)
                .is_some_and(|rest| rest.starts_with(':'))
        })?;
        let value = lines.take_while(|line| line.starts_with([' ', '-']));
        Some(
            [first]
                .into_iter()
                .chain(value)
                .collect::<Vec<_>>()
                .join("\n"),
        )
    }

    /// Returns the value of a key that is on the key's own line, without quotes.
    pub(crate) fn scalar(&self, key: &str) -> Option<String> {
        let entry = self.entry(key)?;
        let value = entry.split_once(':')?.1.trim().trim_matches(['"', '\'']);
        let one = !value.is_empty() && !value.contains('\n');
        one.then(|| value.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_come_out_as_written_and_the_body_alone() {
        let card = BaseCard::parse(
            "---\r\nlicense: 'llama2'\r\nlanguage:\r\n- en\r\n- fr\r\ndatasets: []\r\n---\r\n\r\n# Title\r\n---\r\nText\r\n",
        );
        assert_eq!(card.scalar("license").as_deref(), Some("llama2"));
        assert_eq!(
            card.entry("language").as_deref(),
            Some("language:\n- en\n- fr")
        );
        assert_eq!(card.scalar("language"), None);
        assert_eq!(card.entry("licens"), None);
        assert_eq!(card.body, "# Title\n---\nText");
    }

    #[test]
    fn a_card_without_front_matter_is_all_body() {
        let card = BaseCard::parse("# Title\n");
        assert_eq!(
            (card.body.as_str(), card.entry("license")),
            ("# Title", None)
        );
    }
}
