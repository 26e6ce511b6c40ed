use super::super::file::tests::{flags, parse};
use super::*;

fn cells(text: &str, filters: &[&str]) -> Result<Vec<Cell>> {
    let matrix = parse(text)?;
    let filters = filters.iter().map(|text| matrix.filter(text)).collect::<Result<Vec<_>>>()?;
    matrix.cells(&flags(), &filters)
}

fn names(text: &str, filters: &[&str]) -> Vec<String> {
    cells(text, filters).unwrap().into_iter().map(|cell| cell.name).collect()
}

fn refusal(text: &str) -> String {
    cells(text, &[]).unwrap_err().to_string()
}

const TWO: &str = "[matrix]\nkernel = [\"a\", \"b\"]\ncpus = [1, 24]\n";

#[test]
fn every_combination_is_a_cell_with_the_later_setting_first() {
    let text = r#"
        command = ["run", "{suite}", "{kernel}", "${suite} {other} {", "{cpus}"]
        cpus = 8
        cmdline = "common"
        [matrix]
        kernel = ["k/a", { name = "b", kernel = "k/b", cmdline = "of-b {suite}" }]
        suite = ["timers"]
    "#;
    let [first, second] = cells(text, &[]).unwrap().try_into().unwrap();
    assert_eq!(first.name, "kernel=a,suite=timers");
    assert_eq!(first.flags, ["--cpus=8", "--cmdline=common", "--kernel=k/a"]);
    assert_eq!(first.command, ["run", "timers", "a", "${suite} {other} {", "8"]);
    assert_eq!(second.labels, [Some("b".to_owned()), Some("timers".to_owned())]);
    assert_eq!(second.flags, ["--cpus=8", "--cmdline=common", "--kernel=k/b", "--cmdline=of-b timers"]);
    let text = "cpus = 8\npin = true\n[matrix]\ncpus = [1]\npin = [{ name = \"no\", pin = false }]\n";
    assert_eq!(
        cells(text, &[]).unwrap()[0].flags,
        ["--cpus=1"],
        "of one that is given twice the last one counts"
    );
    assert_eq!(
        names(TWO, &[]),
        ["kernel=a,cpus=1", "kernel=a,cpus=24", "kernel=b,cpus=1", "kernel=b,cpus=24"]
    );
    let [alone] = cells("kernel = \"k\"\ngeneration-id = true", &[]).unwrap().try_into().unwrap();
    assert_eq!(
        (alone.name.as_str(), alone.flags),
        ("all", vec!["--kernel=k".to_owned(), "--generation-id".into()])
    );
}

#[test]
fn some_are_left_out_and_some_added() {
    let text = format!(
        "{TWO}[[exclude]]\nkernel = \"a\"\ncpus = [1, 24]\n[[include]]\nkernel = \"b\"\ncpus = 3\n[[include]]\nkernel = \"c\"\nmemory = \"9G\"\n"
    );
    assert_eq!(
        names(&text, &[]),
        ["kernel=b,cpus=1", "kernel=b,cpus=24", "kernel=b,cpus=3", "kernel=c,memory=9G"]
    );
    let added = cells(&text, &["kernel=c"]).unwrap();
    assert_eq!(added[0].flags, ["--kernel=c", "--memory=9G"]);
    assert_eq!(added[0].labels, [Some("c".to_owned()), None]);
    let only = "command = \"{mode}\"\n[[include]]\nkernel = \"k\"\nmode = \"x\"\n";
    assert_eq!(names(only, &[]), ["kernel=k,mode=x"]);
    assert!(refusal(&format!("{TWO}[[exclude]]\ncpus = [1, 24]\n")).contains("no cell is left\n  hint: "));
    assert!(
        refusal(&format!("{TWO}[[include]]\nkernel = \"a\"\ncpus = 1\n"))
            .ends_with("it has the cell kernel=a,cpus=1 twice")
    );
}

#[test]
fn filters_take_an_axis_by_its_value_and_names_by_their_text() {
    assert_eq!(names(TWO, &["cpus=24"]), ["kernel=a,cpus=24", "kernel=b,cpus=24"]);
    assert_eq!(names(TWO, &["cpus=24", "kernel=a"]), ["kernel=a,cpus=24"]);
    assert_eq!(names(TWO, &["a,c"]), ["kernel=a,cpus=1", "kernel=a,cpus=24"]);
    let told = cells(TWO, &["cpus=2"]).unwrap_err().to_string();
    assert_eq!(told, "use --filter cpus=2: `cpus` has no such value\n  hint: it has 1, 24");
    assert!(cells(TWO, &["nothing"]).is_err());
}

#[test]
fn a_variable_without_a_place_is_a_mistake() {
    let told = refusal("command = \"{suit}\"\n[matrix]\nsuite = [\"a\"]\n");
    assert!(
        told.starts_with(
            "lay out the matrix: `suite` is no flag of mayfly run, and {suite} stands nowhere\n  hint: "
        ),
        "{told}"
    );
    assert!(told.contains("the flags are kernel, cpus, memory"), "{told}");
}

#[test]
fn a_matrix_has_a_size() {
    let axis =
        |name: &str| format!("{name} = [{}]\n", (0..20).map(|n| n.to_string()).collect::<Vec<_>>().join(","));
    let text = format!("[matrix]\n{}{}{}{}", axis("cpus"), axis("memory"), axis("kernel"), axis("cmdline"));
    assert_eq!(refusal(&text), "lay out the matrix: it has more than 4096 cells");
}
