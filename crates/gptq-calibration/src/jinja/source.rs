//! Rewrites a template's source so that the library reads it as Transformers does. Line numbers
//! stay the same.

use minijinja::machinery::{Span, Token, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Error, ErrorKind};

use super::python::float_text;

/// Name of the filter that copies. A template may use it too, without effect on the limits.
pub(super) const COPY: &str = "gptq_copy";
/// Name of the filter that returns its input: without it the library would fold constants and
/// format numbers differently.
pub(super) const PLAIN: &str = "gptq_plain";
/// Name of the function that `{% generation %}` calls, as Transformers' tag does.
pub(super) const GENERATION: &str = "gptq_generation";

/// Replaces constructs that the library reads differently:
///
/// - `{% set ns.a = b %}` becomes `{% set ns.a = (b)|copy %}`, and `{% set ns.a | b %}`, which opens a block,
///   `{% set ns.a | b|copy %}`;
/// - `{% generation %}` becomes the call block that it is in Transformers;
/// - lines end with a line feed;
/// - a number that Python writes with an exponent becomes `(1e16|plain)`.
///
/// # Errors
/// A source that cannot be split into tokens, and tags that Transformers does not know.
pub(super) fn exchanged(source: &str, syntax: SyntaxConfig) -> Result<String, Error> {
    // As Jinja does, and Python when it reads a file.
    let source = &source.replace("\r\n", "\n").replace('\r', "\n");
    let mut written = Written {
        source,
        text: String::with_capacity(source.len()),
        from: 0,
    };
    let mut tokens = tokenize(source, false, syntax);
    let mut opens = false;
    while let Some((token, span)) = tokens.next().transpose()? {
        let tag = match token {
            Token::Ident(name) if opens => Some(name),
            _ => None,
        };
        opens = matches!(token, Token::BlockStart);
        written.number(&token, span);
        match tag {
            Some("generation") => written.replace(span, &format!("call {GENERATION}()")),
            Some("endgeneration") => written.replace(span, "endcall"),
            Some("do") => {
                let line = usize::from(span.start_line);
                let error = Error::new(
                    ErrorKind::SyntaxError,
                    format!("line {line}: unknown tag do"),
                );
                return Err(error);
            }
            Some("set") => {
                let mut dotted = false;
                let mut value = None;
                while let Some((token, span)) = tokens.next().transpose()? {
                    written.number(&token, span);
                    match (token, value) {
                        (Token::Dot, None) => dotted = true,
                        (Token::Pipe, None) => value = Some("|"),
                        (Token::Assign, None) => {
                            value = Some(")|");
                            if dotted {
                                written.to(span.end_offset, "(");
                            }
                        }
                        (Token::BlockEnd, value) => {
                            if let (true, Some(close)) = (dotted, value) {
                                written.to(span.start_offset, close);
                                written.to(span.start_offset, COPY);
                                written.to(span.start_offset, " ");
                            }
                            break;
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    written.to(u32::try_from(source.len()).unwrap_or(u32::MAX), "");
    Ok(written.text)
}

struct Written<'s> {
    source: &'s str,
    text: String,
    from: usize,
}

impl Written<'_> {
    /// Copies the source up to `offset`, then writes `then`.
    fn to(&mut self, offset: u32, then: &str) {
        let offset = offset as usize;
        self.text
            .push_str(self.source.get(self.from..offset).unwrap_or_default());
        self.text.push_str(then);
        self.from = offset;
    }

    /// Writes `then` in place of `span`.
    fn replace(&mut self, span: Span, then: &str) {
        self.to(span.start_offset, then);
        self.from = span.end_offset as usize;
    }

    fn number(&mut self, token: &Token<'_>, span: Span) {
        if let Token::Float(number) = token
            && float_text(*number, "inf", "nan").contains('e')
        {
            self.to(span.start_offset, "(");
            self.to(span.end_offset, "|");
            self.text.push_str(PLAIN);
            self.text.push(')');
        }
    }
}
