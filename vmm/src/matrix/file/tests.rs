use super::*;

/// Some flags of each kind.
pub fn flags() -> Vec<Flag> {
    let flag = |(name, taking): (&str, Taking)| Flag { name: name.to_owned(), taking };
    let all = [
        ("kernel", Taking::One),
        ("cpus", Taking::One),
        ("memory", Taking::One),
        ("cmdline", Taking::Many),
        ("env", Taking::Many),
        ("disk", Taking::Many),
        ("rng", Taking::Many),
        ("pin", Taking::Switch),
        ("generation-id", Taking::Maybe),
    ];
    all.into_iter().map(flag).collect()
}

pub fn parse(text: &str) -> Result<Matrix> {
    read("m.toml", text, &flags())
}

fn refusal(text: &str) -> String {
    let fail = parse(text).unwrap_err();
    assert_eq!(fail.why, Why::Usage);
    fail.to_string().strip_prefix("read the matrix m.toml: ").unwrap().to_owned()
}

fn setting(key: &str, values: &[&str]) -> Setting {
    Setting { key: key.into(), values: values.iter().map(|value| (*value).to_owned()).collect() }
}

#[test]
fn each_kind_of_value_becomes_what_would_be_typed() {
    let matrix = parse(
        r#"
        retries = 2
        command = ["make", "check", 3]
        cpus = 2
        memory = "1G"
        cmdline = ["quiet", "nosmp"]
        env = { A = "1", B = true }
        disk = [{ path = "a.img", readonly = true }, "b.img"]
        rng = false
        pin = true
        generation-id = true
        "#,
    )
    .unwrap();
    assert_eq!((matrix.retries, matrix.command), (2, vec!["make".to_owned(), "check".into(), "3".into()]));
    let wanted = [
        setting("cpus", &["2"]),
        setting("memory", &["1G"]),
        setting("cmdline", &["quiet", "nosmp"]),
        setting("env", &["A=1", "B=on"]),
        setting("disk", &["path=a.img,readonly=on", "b.img"]),
        setting("rng", &["off"]),
        setting("pin", &[""]),
        setting("generation-id", &[""]),
    ];
    assert_eq!(matrix.settings, wanted);
    let off = parse("pin = false\ngeneration-id = \"01234567\"\ncommand = \"a | b\"").unwrap();
    assert_eq!(off.settings, [setting("pin", &[]), setting("generation-id", &["01234567"])]);
    assert_eq!(off.command, ["sh", "-c", "a | b"]);
}

#[test]
fn axes_have_labels_and_set_what_they_say() {
    let matrix = parse(
        r#"
        [matrix]
        kernel = ["../a/linux", "../b/linux", "k/vmlinuz-6.1", "6.9", { name = "debug", kernel = "d/linux", cmdline = "x" }]
        mode = ["fast", { name = "slow", cpus = 1 }]
        "#,
    )
    .unwrap();
    let labels = |axis: &Axis| axis.choices.iter().map(|choice| choice.label.clone()).collect::<Vec<_>>();
    let [kernel, mode] = matrix.axes.as_slice() else { panic!("{:?}", matrix.axes) };
    assert_eq!(
        labels(kernel),
        ["../a/linux", "../b/linux", "vmlinuz-6.1", "6.9", "debug"],
        "short where that is clear"
    );
    assert_eq!(kernel.choices[4].settings, [setting("kernel", &["d/linux"]), setting("cmdline", &["x"])]);
    assert_eq!(labels(mode), ["fast", "slow"]);
    assert_eq!(mode.choices[0].settings, [setting("mode", &["fast"])]);
    assert_eq!(mode.choices[1].settings, [setting("cpus", &["1"]), setting("mode", &["slow"])]);
    assert_eq!(kernel.find("k/vmlinuz-6.1"), kernel.find("vmlinuz-6.1"));
}

#[test]
fn what_makes_no_sense_is_refused_with_what_would() {
    let told = refusal("comand = \"x\"");
    assert!(told.starts_with("it does not know `comand`\n  hint: it knows command, retries, matrix, exclude, include and the flags of mayfly run: kernel, cpus,"), "{told}");
    assert_eq!(refusal("cpus = 1\nb"), "line 2: key with no value, expected `=`");
    assert_eq!(
        refusal("cpus = [1, 2]"),
        "`cpus` has one value only\n  hint: several to choose from go into the table of axes: [matrix], cpus = [...]"
    );
    assert_eq!(refusal("pin = 1"), "`pin` is true or false");
    assert_eq!(refusal("retries = -1"), "`retries` is a number from 0 to 100");
    assert_eq!(refusal("command = 1"), "`command` is a line for the shell, or a list of words");
    assert!(
        refusal("disk = { path = \"a,b\" }")
            .starts_with("`disk` cannot say `path=a,b`: there is a comma in it\n")
    );
    assert_eq!(refusal("cpus = 1979-05-27"), "`cpus` is no text, number, true or false");
    assert_eq!(refusal("matrix = 1"), "`matrix` is a table of axes: [matrix]");
    assert_eq!(refusal("[matrix]\ncpus = 1"), "`cpus` is a list");
    assert_eq!(refusal("[matrix]\ncpus = []"), "the axis `cpus` has no value");
    assert_eq!(refusal("[matrix]\ncpus = [1, \"1\"]"), "the axis `cpus` has `1` twice");
    assert_eq!(refusal("[matrix]\ncommand = [\"a\"]"), "`command` cannot be an axis: it is for all cells");
    assert_eq!(refusal("[matrix]\nmode = [{ cpus = 1 }]"), "a value of the axis `mode` has no `name`");
    assert!(
        refusal("[matrix]\nmode = [{ name = \"a\", cpu = 1 }]")
            .starts_with("it does not know `cpu`\n  hint: it knows name, mode and the flags")
    );
    assert_eq!(refusal("exclude = [1]"), "`exclude` is a list of tables: [[exclude]]");
    let axis = "[matrix]\ncpus = [1]\n";
    assert_eq!(refusal(&format!("{axis}[[exclude]]\ncpu = 1")), "`exclude` names `cpu`, which is no axis");
    assert_eq!(
        refusal(&format!("{axis}[[exclude]]\ncpus = 3")),
        "`exclude` names cpus = 3, which the axis does not have"
    );
}
