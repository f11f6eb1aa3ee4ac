//! Commands that need no daemon, as users type them.

use std::{fs, process::Command};

use tests::{
    daemon::{Outcome, outcome},
    machine,
};

fn check(text: &str, more: &[&str]) -> Outcome {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("xlb.toml");
    fs::write(&path, text).unwrap();
    let mut command = Command::new(machine::xlb());
    command.args(["check", "-c"]).arg(&path).args(more);
    outcome(&mut command)
}

const GOOD: &str = r#"
interfaces = ["eth0"]
[[service]]
name = "web"
vip = "203.0.113.10"
port = 80
protocol = "tcp"
[[service.backend]]
address = "10.0.0.11:8080"
"#;

#[test]
fn check_accepts_a_good_configuration() {
    let good = check(GOOD, &[]);
    assert_eq!((good.code, good.stderr.as_str()), (0, ""), "{good:?}");
    let good = check(GOOD, &["-o", "json"]);
    let report: serde_json::Value = serde_json::from_str(&good.stdout).unwrap();
    assert_eq!((good.code, &report["valid"]), (0, &serde_json::Value::Bool(true)));
}

#[test]
fn check_tells_every_error_of_a_broken_configuration_with_78() {
    let broken = GOOD
        .replace("vip = \"203.0.113.10\"", "vip = \"203.0.113\"")
        .replace("port = 80\n", "port = 0\n")
        .replace("protocol", "protcol");
    let outcome = check(&broken, &[]);
    assert_eq!(outcome.code, 78);
    let told = format!("{}{}", outcome.stdout, outcome.stderr);
    for part in [
        "203.0.113\"",
        "port = 0",
        "protcol",
        "xlb.toml:5",
        "xlb.toml:6",
        "xlb.toml:7",
        "^",
    ] {
        assert!(told.contains(part), "{part}: {told}");
    }
    // Neither a terminal nor colours.
    assert!(!told.contains('\u{1b}'), "{told}");

    let outcome = check(&broken, &["-o", "json"]);
    let report: serde_json::Value = serde_json::from_str(&outcome.stdout).unwrap();
    assert_eq!(
        (outcome.code, &report["valid"]),
        (78, &serde_json::Value::Bool(false))
    );
    assert!(report["errors"].as_array().unwrap().len() >= 3, "{report}");
}

#[test]
fn no_color_is_honoured_even_where_colours_are_forced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("xlb.toml");
    fs::write(&path, "interfaces = 3").unwrap();
    let mut command = Command::new(machine::xlb());
    command.args(["check", "-c"]).arg(&path).env("NO_COLOR", "1");
    let outcome = outcome(&mut command);
    assert_eq!(outcome.code, 78);
    assert!(!format!("{outcome:?}").contains("\\u{1b}"), "{outcome:?}");
}

#[test]
fn a_daemon_without_a_good_configuration_exits_with_78_and_bad_usage_with_2() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("xlb.toml");
    let run = || outcome(Command::new(machine::xlb()).args(["run", "-c"]).arg(&path));
    let missing = run();
    assert_eq!(missing.code, 78, "{missing:?}");
    assert!(missing.stderr.contains("xlb.toml"), "{missing:?}");
    fs::write(&path, "interfaces = 3").unwrap();
    assert_eq!(run().code, 78);

    let usage = outcome(Command::new(machine::xlb()).arg("balance"));
    assert_eq!(usage.code, 2, "{usage:?}");
}
