//! What the demo shows while it runs: redrawn in place on a terminal, a line a second elsewhere.

use std::{
    collections::VecDeque,
    env,
    fmt::Write as _,
    io::{self, IsTerminal, Write},
    time::{Duration, Instant},
};

use anstream::ColorChoice;

use super::health_word;
use crate::model::Health;

/// Between two redraws.
const REDRAW: Duration = Duration::from_millis(250);
/// Between two lines.
const LINE: Duration = Duration::from_secs(1);
/// Events that stay on the screen.
const EVENTS: usize = 8;
/// Cells of a bar that stands for all connections.
const BAR: usize = 40;

/// The state of the demo at one moment.
#[derive(Clone, Debug)]
pub struct Picture {
    pub now: Duration,
    /// How long the demo is going to be.
    pub length: Duration,
    pub rows: Vec<Row>,
    /// New connections that were answered in the last second.
    pub rate: usize,
    /// New connections since the start.
    pub connections: usize,
    /// Those of them that failed, excused or not.
    pub errors: usize,
    /// Part of the download that has arrived.
    pub downloaded: f64,
    /// The backend that the download comes through.
    pub holder: String,
}

/// A backend at one moment.
#[derive(Clone, Debug)]
pub struct Row {
    pub name: String,
    /// Of the new connections of the last second.
    pub share: f64,
    pub health: Health,
    /// Flows that the program in the kernel has ever put on it.
    pub flows: u64,
    /// Connections that are kept open.
    pub kept: usize,
}

/// Where the demo shows itself. Whoever closes the output does not end the demo.
#[derive(Debug)]
pub enum Display {
    Silent,
    Lines { next: Option<Instant> },
    Screen(Screen),
}

/// A part of a terminal that is drawn over and over.
#[derive(Debug)]
pub struct Screen {
    colours: bool,
    next: Option<Instant>,
    events: VecDeque<String>,
    /// Lines that the last drawing took.
    height: usize,
}

impl Display {
    /// What fits standard output.
    pub fn for_stdout() -> Self {
        let is_dumb = env::var_os("TERM").is_none_or(|terminal| terminal == "dumb");
        if io::stdout().is_terminal() && !is_dumb {
            let choice = anstream::AutoStream::choice(&io::stdout());
            Self::Screen(Screen {
                colours: choice != ColorChoice::Never,
                next: None,
                events: VecDeque::new(),
                height: 0,
            })
        } else {
            Self::Lines { next: None }
        }
    }

    /// Something has happened.
    pub fn event(&mut self, now: Duration, text: &str) {
        let line = format!("{:5.1} s  {text}", now.as_secs_f64());
        match self {
            Self::Silent => {}
            Self::Lines { .. } => put(&format!("{line}\n")),
            Self::Screen(screen) => {
                screen.next = None;
                if screen.height == 0 {
                    // Nothing runs yet that could be drawn.
                    put(&format!("{line}\n"));
                    return;
                }
                screen.events.push_back(line);
                if screen.events.len() > EVENTS {
                    screen.events.pop_front();
                }
            }
        }
    }

    /// Shows how things are, unless it has just done so.
    pub fn show(&mut self, picture: &Picture) {
        let now = Instant::now();
        let is_due = |next: Option<Instant>| next.is_none_or(|next| now >= next);
        match self {
            Self::Lines { next } if is_due(*next) => {
                *next = Some(now + LINE);
                put(&line(picture));
            }
            Self::Screen(screen) if is_due(screen.next) => {
                screen.next = Some(now + REDRAW);
                screen.draw(picture);
            }
            _ => {}
        }
    }
}

impl Screen {
    fn draw(&mut self, picture: &Picture) {
        let text = self.text(picture);
        let up = match self.height {
            // Lines that are too long are cut by the terminal, or drawing over them would miss their second half.
            0 => "\x1b[?7l\x1b[?25l".to_owned(),
            height => format!("\x1b[{height}A"),
        };
        self.height = text.lines().count();
        put(&format!("{up}\r{}\x1b[J", text.replace('\n', "\x1b[K\n")));
    }

    fn text(&self, picture: &Picture) -> String {
        let mut text = format!(
            "\nxlb demo   {:.1} of {:.0} s   {} new connections/s   {} so far, {} errors\n\n",
            picture.now.as_secs_f64(),
            picture.length.as_secs_f64(),
            picture.rate,
            picture.connections,
            picture.errors
        );
        for row in &picture.rows {
            let cells = (row.share * BAR as f64).round() as usize;
            let bar = self.coloured("32", &"█".repeat(cells.min(BAR)));
            let word = health_word(row.health);
            let health = match row.health {
                Health::Up => self.coloured("32", &format!("{word:<7}")),
                _ => self.coloured("1;31", &format!("{word:<7}")),
            };
            // Writing to a String does not fail.
            let _ = writeln!(
                text,
                "  {}  {health}  {:>3.0} %  {bar}{}  {} kept open, {} flows so far",
                row.name,
                row.share * 100.0,
                "·".repeat(BAR.saturating_sub(cells)),
                row.kept,
                row.flows
            );
        }
        let _ = writeln!(
            text,
            "\n  download through {}: {:.0} %\n",
            picture.holder,
            picture.downloaded * 100.0
        );
        for event in &self.events {
            let _ = writeln!(text, "{event}");
        }
        text
    }

    fn coloured(&self, code: &str, text: &str) -> String {
        if self.colours && !text.is_empty() {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        if self.height > 0 {
            put("\x1b[?7h\x1b[?25h");
        }
    }
}

fn line(picture: &Picture) -> String {
    let rows: Vec<String> = picture
        .rows
        .iter()
        .map(|row| {
            format!(
                "{} {:>7} {:>3.0} %",
                row.name,
                health_word(row.health),
                row.share * 100.0
            )
        })
        .collect();
    format!(
        "{:5.1} s  {}  {} new connections/s, {} errors so far, download {:.0} %\n",
        picture.now.as_secs_f64(),
        rows.join(" | "),
        picture.rate,
        picture.errors,
        picture.downloaded * 100.0
    )
}

/// Writes to standard output.
fn put(text: &str) {
    let mut stdout = io::stdout().lock();
    let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture() -> Picture {
        let row = |name: &str, share, health| Row {
            name: name.to_owned(),
            share,
            health,
            flows: 7,
            kept: 4,
        };
        Picture {
            now: Duration::from_millis(6250),
            length: Duration::from_secs(20),
            rows: vec![row("a", 0.625, Health::Up), row("b", 0.0, Health::Down)],
            rate: 198,
            connections: 1200,
            errors: 3,
            downloaded: 0.5,
            holder: "a".to_owned(),
        }
    }

    fn screen(colours: bool) -> Screen {
        Screen {
            colours,
            next: None,
            events: ["  6.1 s  b is down: connection refused".to_owned()].into(),
            height: 0,
        }
    }

    #[test]
    fn a_line_tells_every_backend() {
        assert_eq!(
            line(&picture()),
            "  6.2 s  a      up  62 % | b    down   0 %  198 new connections/s, 3 errors so far, download 50 %\n"
        );
    }

    #[test]
    fn a_screen_shows_bars_and_events() {
        let text = screen(false).text(&picture());
        let bar = format!(
            "  a  up        62 %  {}{}  4 kept open, 7 flows so far\n",
            "█".repeat(25),
            "·".repeat(15)
        );
        assert!(text.contains(&bar), "{text}");
        assert!(
            text.ends_with("\n  6.1 s  b is down: connection refused\n"),
            "{text}"
        );
    }

    #[test]
    fn colours_come_only_where_they_are_wanted() {
        assert!(!screen(false).text(&picture()).contains('\x1b'));
        assert!(screen(true).text(&picture()).contains("\x1b[1;31mdown"));
    }
}
