//! What is wrong in a configuration, where, and what to write instead.

use std::{fmt, ops::Range};

use annotate_snippets::{AnnotationKind, Group, Level, Renderer, Snippet, normalize_untrusted_str};
use serde::Serialize;

/// Place in the text: offsets in bytes.
pub type Span = Range<usize>;

/// One mistake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    pub span: Span,
    pub message: String,
    /// What to write instead.
    pub help: String,
    /// The other place that has to do with it, and what is there.
    pub related: Option<(Span, String)>,
}

impl Diagnostic {
    pub fn new(span: Span, message: impl Into<String>, help: impl Into<String>) -> Self {
        Self {
            span,
            message: message.into(),
            help: help.into(),
            related: None,
        }
    }

    /// Adds the other place that has to do with it.
    #[must_use]
    pub fn with_related(mut self, span: Span, label: impl Into<String>) -> Self {
        self.related = Some((span, label.into()));
        self
    }
}

/// Everything that is wrong in one text, in the order of the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostics {
    text: String,
    name: String,
    found: Vec<Diagnostic>,
}

/// A mistake as `-o json` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Located {
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
    pub message: String,
    pub help: String,
}

impl Diagnostics {
    pub fn new(text: &str, name: &str, mut found: Vec<Diagnostic>) -> Self {
        found.sort_by_key(|diagnostic| (diagnostic.span.start, diagnostic.span.end));
        Self {
            text: text.to_owned(),
            name: name.to_owned(),
            found,
        }
    }

    pub fn found(&self) -> &[Diagnostic] {
        &self.found
    }

    /// Each mistake with its line and column.
    pub fn located(&self) -> Vec<Located> {
        let line_starts = self.line_starts();
        self.found
            .iter()
            .map(|diagnostic| {
                let (line, column) = self.line_and_column(diagnostic.span.start, &line_starts);
                Located {
                    line,
                    column,
                    message: diagnostic.message.clone(),
                    help: diagnostic.help.clone(),
                }
            })
            .collect()
    }

    /// All mistakes (of a file that is garbage, the first 200) with the lines they are in and carets; `styled`
    /// adds colours as ANSI sequences.
    pub fn render(&self, styled: bool) -> String {
        const SHOWN: usize = 200;
        let renderer = renderer(styled);
        let line_starts = self.line_starts();
        let mut output = String::new();
        for diagnostic in self.found.iter().take(SHOWN) {
            output += &renderer.render(&[self.report(diagnostic, &line_starts)]);
            output += "\n\n";
        }
        let count = self.found.len();
        let errors = if count == 1 { "error" } else { "errors" };
        output += &format!("{count} {errors} in {}", normalize_untrusted_str(&self.name));
        if count > SHOWN {
            output += &format!(", of which the first {SHOWN} are shown");
        }
        output + "\n"
    }

    fn report<'a>(&'a self, diagnostic: &'a Diagnostic, line_starts: &[usize]) -> Group<'a> {
        let window = self.window(diagnostic);
        let (first_line, _) = self.line_and_column(window.start, line_starts);
        let relative = |span: &Span| span.start - window.start..span.end - window.start;
        let mut snippet = Snippet::source(&self.text[window.clone()])
            .path(&self.name)
            .line_start(first_line)
            .annotation(AnnotationKind::Primary.span(relative(&diagnostic.span)));
        if let Some((span, label)) = &diagnostic.related {
            snippet = snippet.annotation(AnnotationKind::Context.span(relative(span)).label(label));
        }
        Level::ERROR
            .primary_title(&diagnostic.message)
            .element(snippet)
            .element(Level::HELP.message(normalize_untrusted_str(&diagnostic.help)))
    }

    /// The lines that a report shows, without the rest of a long text.
    fn window(&self, diagnostic: &Diagnostic) -> Span {
        let related = diagnostic
            .related
            .as_ref()
            .map_or(&diagnostic.span, |(span, _)| span);
        let first = diagnostic.span.start.min(related.start);
        let last = diagnostic.span.end.max(related.end);
        let start = self.text[..first].rfind('\n').map_or(0, |newline| newline + 1);
        let end = self.text[last..]
            .find('\n')
            .map_or(self.text.len(), |newline| last + newline);
        start..end
    }

    fn line_and_column(&self, offset: usize, line_starts: &[usize]) -> (usize, usize) {
        let line = line_starts.partition_point(|start| *start <= offset);
        let start = line_starts[line - 1];
        (line, self.text[start..offset].chars().count() + 1)
    }

    /// Where each line starts; the first at 0.
    fn line_starts(&self) -> Vec<usize> {
        let newlines = self.text.match_indices('\n').map(|(newline, _)| newline + 1);
        std::iter::once(0).chain(newlines).collect()
    }
}

/// One line for a log: how many mistakes there are and the first of them.
impl fmt::Display for Diagnostics {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.located().first() {
            None => write!(formatter, "configuration {} is invalid", self.name),
            Some(Located {
                line,
                column,
                message,
                help,
            }) => {
                write!(
                    formatter,
                    "{}:{line}:{column}: {message} (help: {help})",
                    self.name
                )?;
                match self.found.len() - 1 {
                    0 => Ok(()),
                    more => write!(formatter, ", and {more} more"),
                }
            }
        }
    }
}

impl std::error::Error for Diagnostics {}

/// An error that has no place in a text, in the same form as the others.
pub fn render_without_place(message: &str, help: Option<&str>, styled: bool) -> String {
    let mut group = Group::with_title(Level::ERROR.primary_title(message));
    if let Some(help) = help {
        group = group.element(Level::HELP.message(normalize_untrusted_str(help)));
    }
    renderer(styled).render(&[group]) + "\n"
}

fn renderer(styled: bool) -> Renderer {
    if styled {
        Renderer::styled()
    } else {
        Renderer::plain()
    }
}
