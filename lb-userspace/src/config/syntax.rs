//! From text to a TOML document, or what keeps it from being one.

use std::string::FromUtf8Error;

use toml::{Spanned, de::DeTable};

use super::diagnostic::{Diagnostic, Diagnostics, Span};

/// The document, unless the text is not TOML.
pub(super) fn document<'a>(text: &'a str, found: &mut Vec<Diagnostic>) -> Option<Spanned<DeTable<'a>>> {
    let (document, mut errors) = DeTable::parse_recoverable(text);
    if errors.is_empty() {
        return Some(document);
    }
    errors.sort_by_key(|error| place(error, text).start);
    let mut last_line = None;
    for error in errors {
        let span = place(&error, text);
        let line = line_around(text, span.start);
        // After the first error the parser may have lost its way, for instance in an array that is never closed:
        // what follows counts only when the line is wrong by itself.
        let follows_from_the_first =
            last_line.is_some() && !is_duplicate(&error) && is_toml(&text[line.clone()]);
        if last_line.as_ref() == Some(&line) || follows_from_the_first {
            continue;
        }
        found.push(diagnostic(&error, span, &text[line.clone()]));
        last_line = Some(line);
    }
    None
}

/// A file that is not text at all.
pub(super) fn not_utf8(error: &FromUtf8Error, name: &str) -> Diagnostics {
    let place = error.utf8_error().valid_up_to();
    // What is valid stays as it is, so the place is the same in the text that is shown.
    let text = String::from_utf8_lossy(error.as_bytes()).into_owned();
    let diagnostic = Diagnostic::new(
        place..place + char::REPLACEMENT_CHARACTER.len_utf8(),
        "not UTF-8 text",
        "save the file in the encoding UTF-8",
    );
    Diagnostics::new(&text, name, vec![diagnostic])
}

fn diagnostic(error: &toml::de::Error, span: Span, line: &str) -> Diagnostic {
    if is_duplicate(error) {
        return Diagnostic::new(
            span,
            "this key or table was given before",
            "keep one of them; for one more service or backend write `[[service]]` or `[[service.backend]]`, \
             in double brackets",
        );
    }
    Diagnostic::new(span, format!("not valid TOML: {}", error.message()), help(line))
}

/// What a line that is not TOML was probably meant to be.
fn help(line: &str) -> String {
    let line = line.trim();
    if line.starts_with('[') && is_toml(line) {
        return "close the list above this line with `]`".to_owned();
    }
    if line.starts_with('[') {
        return "close the brackets, as in `[flow-table]` or `[[service]]`".to_owned();
    }
    let Some((key, value)) = line.split_once('=') else {
        return "write `key = value`, one to a line; comments start with `#`".to_owned();
    };
    let (key, value) = (key.trim(), value.split('#').next().unwrap_or_default().trim());
    let unquoted = !value.contains(|character: char| "\"'[]{}=\\\u{201c}\u{201d}".contains(character));
    if line.len() > 120 {
        "write one `key = value` to a line, text in \"…\", lists in […] with commas between the items"
            .to_owned()
    } else if key.is_empty() {
        "write the name of the key before `=`".to_owned()
    } else if value.is_empty() {
        format!("write a value after `{key} =`")
    } else if unquoted && value.contains(',') {
        format!("write `{key} = [{value}]`")
    } else if unquoted && value.chars().all(|character| character.is_ascii_digit()) {
        format!(
            "write `{key} = {}`, without leading zeros",
            value.trim_start_matches('0')
        )
    } else if unquoted {
        format!("write `{key} = \"{value}\"`: text, addresses and durations go in quotes")
    } else {
        "text goes in \"…\", lists in […] with commas between the items".to_owned()
    }
}

// The parser tells kinds of errors apart by their text alone; a test holds this one.
fn is_duplicate(error: &toml::de::Error) -> bool {
    error.message() == "duplicate key"
}

fn is_toml(line: &str) -> bool {
    DeTable::parse(line).is_ok()
}

/// Where the error is; on the whole character that it starts in.
fn place(error: &toml::de::Error, text: &str) -> Span {
    let span = error.span().unwrap_or(0..0);
    let start = text.floor_char_boundary(span.start);
    start..text.ceil_char_boundary(span.end.max(start))
}

fn line_around(text: &str, offset: usize) -> Span {
    let start = text[..offset].rfind('\n').map_or(0, |newline| newline + 1);
    let end = text[offset..]
        .find('\n')
        .map_or(text.len(), |newline| offset + newline);
    start..end
}
