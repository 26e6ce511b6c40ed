use super::*;

/// Something that is done to a tree.
type Step<'a> = &'a dyn Fn(&mut Tree) -> io::Result<()>;

fn directory() -> Kind {
    Kind::Directory(BTreeMap::new())
}

#[test]
fn every_name_and_every_text_is_counted() {
    let with = |name: &[u8], value: &[u8]| Meta {
        attributes: BTreeMap::from([(name.to_vec(), value.to_vec())]),
        ..Meta::default()
    };
    let mut tree = Tree::default();
    let mut costs = |what: &str, names: usize, text: usize, step: &dyn Fn(&mut Tree)| {
        let before = (tree.names, tree.text);
        step(&mut tree);
        assert_eq!((before.0 - tree.names, before.1 - tree.text), (names, text), "{what}");
    };
    costs("a file, and a directory on the way", 2, 7, &|tree| {
        tree.put(b"dir/file", Kind::Fifo, Meta::default()).unwrap();
    });
    costs("the same again", 1, 4, &|tree| tree.put(b"dir/file", Kind::Fifo, Meta::default()).unwrap());
    costs("a second name", 1, 3, &|tree| tree.link(b"two", b"dir/file").unwrap());
    costs("a link", 1, 8, &|tree| {
        tree.put(b"soft", Kind::Link(b"text".to_vec()), Meta::default()).unwrap();
    });
    let named = with(b"user.a", b"bc");
    costs("attributes of a directory that is there", 1, 3 + 8 + ATTRIBUTE, &|tree| {
        tree.put(b"dir", directory(), named.clone()).unwrap();
    });
    costs("those of the top", 1, 8 + ATTRIBUTE, &|tree| tree.put(b"", directory(), named.clone()).unwrap());
    costs("what is furnished", 1, 1, &|tree| tree.furnish(b"w").unwrap());
}

#[test]
fn whatever_goes_on_for_too_long_is_refused() {
    let steps: [Step<'_>; 4] = [
        &|tree| tree.put(b"a", Kind::Link(b"b".to_vec()), Meta::default()),
        &|tree| tree.put(b"d", directory(), Meta::default()),
        &|tree| tree.link(b"again", b"f"),
        &|tree| tree.put(b"x/x/x/x", Kind::Fifo, Meta::default()),
    ];
    for (number, step) in steps.into_iter().enumerate() {
        for (names, text, told) in
            [(9, TEXT_MAX, "more than 2000000 files"), (NAMES_MAX, 9, "more than 1 GiB")]
        {
            let mut tree = Tree::default();
            tree.put(b"f", Kind::Fifo, Meta::default()).unwrap();
            (tree.names, tree.text) = (names, text);
            let refused = (0..10).find_map(|_| step(&mut tree).err()).map(|error| error.to_string());
            assert!(refused.as_ref().is_some_and(|text| text.ends_with(told)), "{number}: {refused:?}");
        }
    }
    let mut tree = Tree::default();
    tree.begin_layer();
    tree.charge_bytes(BYTES_MAX).unwrap();
    tree.begin_layer();
    assert_eq!(tree.charge_bytes(1).unwrap_err().to_string(), "its files have more than 256 GiB");
}

/// Marks are kept for what was walked through: what a later mark skips must be as if it were walked through again.
#[test]
fn what_was_cleared_once_in_a_layer_stays_right() {
    let mut tree = Tree::default();
    let put = |tree: &mut Tree, path: &str| tree.put(path.as_bytes(), Kind::Fifo, Meta::default()).unwrap();
    tree.begin_layer();
    ["a/b/old", "a/c/old", "a/old", "z/old"].iter().for_each(|path| put(&mut tree, path));
    tree.begin_layer();
    put(&mut tree, "a/b/new");
    tree.clear(b"a/b").unwrap();
    tree.clear(b"a/c").unwrap();
    put(&mut tree, "a/b/newer");
    tree.clear(b"a").unwrap();
    tree.clear(b"a").unwrap();
    tree.remove(b"a/b").unwrap();
    let there = |tree: &mut Tree, path: &str| tree.find(path.as_bytes()).unwrap().is_some();
    for (path, wanted) in [
        ("a/b/new", true),
        ("a/b/newer", true),
        ("a/b/old", false),
        ("a/c", false),
        ("a/old", false),
        ("z/old", true),
    ] {
        assert_eq!(there(&mut tree, path), wanted, "{path}");
    }
    // To the next layer all of it is old.
    tree.begin_layer();
    tree.clear(b"a").unwrap();
    tree.remove(b"z").unwrap();
    for (path, wanted) in [("a", true), ("a/b", false), ("z", false)] {
        assert_eq!(there(&mut tree, path), wanted, "{path}");
    }
}
