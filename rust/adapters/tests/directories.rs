//! Where weights and checkpoints lie: shards with an index and without, adapters one directory below.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use common::{LIMITS, Peft, assert_error, base};
use loraserve_adapters::{check, load};
use serde_json::{Value, json};

const WEIGHTS: &str = "adapter_model.safetensors";
const INDEX: &str = "adapter_model.safetensors.index.json";

/// `Peft::new` in two shards of these names, without an index; which tensor lies where.
fn sharded(names: [&str; 2]) -> (Peft, BTreeMap<String, String>) {
    let mut peft = Peft::new();
    let all = std::mem::take(&mut peft.tensors);
    let mut map = BTreeMap::new();
    let mut halves = [BTreeMap::new(), BTreeMap::new()];
    for (index, (name, tensor)) in all.into_iter().enumerate() {
        map.insert(name.clone(), names[index % 2].to_string());
        halves[index % 2].insert(name, tensor);
    }
    for (name, half) in names.into_iter().zip(halves) {
        peft.tensors = half;
        peft.write();
        fs::rename(peft.weights_path(), peft.path().join(name)).unwrap();
    }
    (peft, map)
}

fn write_index(directory: &Path, name: &str, weight_map: &impl serde::Serialize) {
    let index = json!({"metadata": {"total_size": 1}, "weight_map": weight_map});
    fs::write(directory.join(name), index.to_string()).unwrap();
}

const NUMBERED: [&str; 2] = [
    "adapter_model-00001-of-00002.safetensors",
    "adapter_model-00002-of-00002.safetensors",
];

#[test]
fn shards_are_read_as_one_file() {
    let plain = Peft::new().check().unwrap();
    for (names, index) in [
        (NUMBERED, Some(INDEX)),
        (NUMBERED, None),
        (["model-1.safetensors", "model-2.safetensors"], Some(INDEX)),
        (
            [
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
            ],
            Some("model.safetensors.index.json"),
        ),
    ] {
        let (peft, map) = sharded(names);
        if let Some(index) = index {
            write_index(peft.path(), index, &map);
        }
        let receipt = check(peft.path(), &base(), LIMITS).unwrap();
        assert_eq!(receipt.hash, plain.hash);
        assert_eq!(receipt.notes, ["weights: 2 shards read as one file"]);
        let mut extent = vec![0; receipt.nbytes];
        load(peft.path(), &base(), LIMITS, &plain.hash, &mut extent).unwrap();
    }
}

#[test]
fn shards_that_do_not_make_one_adapter_are_refused() {
    let (peft, map) = sharded(NUMBERED);
    let path = peft.path();
    let refused = |weight_map: Value, fragment: &str| {
        write_index(path, INDEX, &weight_map);
        assert_error(check(path, &base(), LIMITS), fragment);
    };
    let with = |name: &str, shard: &str| {
        let mut map = map.clone();
        map.insert(name.into(), shard.into());
        json!(map)
    };
    for outside in [
        "../other.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..",
        "x.bin",
        "",
    ] {
        refused(
            with("a", outside),
            "is no safetensors file of the same directory",
        );
    }
    refused(
        with("a", "gone.safetensors"),
        "gone.safetensors does not exist",
    );
    refused(with("a", NUMBERED[0]), "has no tensor \"a\"");
    let mut short = map.clone();
    short.pop_first();
    refused(json!(short), "which a shard has");
    refused(json!({}), "it names 0 shards");
    refused(json!([]), "does not say which shards");
    let many: BTreeMap<_, _> = (0..65)
        .map(|i| (i.to_string(), format!("{i}.safetensors")))
        .collect();
    refused(json!(many), "it names 65 shards, limit is 64");
    fs::write(path.join(INDEX), " ".repeat((4 << 20) + 1)).unwrap();
    assert_error(check(path, &base(), LIMITS), "limit is 4194304");

    fs::remove_file(path.join(INDEX)).unwrap();
    fs::copy(
        path.join(NUMBERED[0]),
        path.join("adapter_model-00003-of-00003.safetensors"),
    )
    .unwrap();
    assert_error(check(path, &base(), LIMITS), "put all of them there");
    fs::remove_file(path.join("adapter_model-00003-of-00003.safetensors")).unwrap();
    fs::copy(path.join(NUMBERED[0]), path.join(NUMBERED[1])).unwrap();
    assert_error(check(path, &base(), LIMITS), "are the same one");
    fs::remove_file(path.join(NUMBERED[1])).unwrap();
    assert_error(check(path, &base(), LIMITS), "one of 2 shards");
}

/// `Peft::new` in a directory of its own below `parent`.
fn below(parent: &Path, name: &str) -> PathBuf {
    let peft = Peft::new();
    peft.write();
    let directory = parent.join(name);
    fs::create_dir(&directory).unwrap();
    for file in ["adapter_config.json", WEIGHTS] {
        fs::copy(peft.path().join(file), directory.join(file)).unwrap();
    }
    directory
}

#[test]
fn the_only_adapter_below_a_directory_is_meant_and_of_several_none() {
    let plain = Peft::new().check().unwrap();
    let output = tempfile::tempdir().unwrap();
    fs::create_dir(output.path().join("runs")).unwrap();
    fs::write(output.path().join("README.md"), "").unwrap();
    let only = below(output.path(), "checkpoint-20");
    let receipt = check(output.path(), &base(), LIMITS).unwrap();
    assert_eq!(
        (receipt.hash, receipt.directory),
        (plain.hash, only.clone())
    );
    assert_eq!(
        receipt.notes,
        ["read from \"checkpoint-20\", the only adapter in the directory given"]
    );

    below(output.path(), "checkpoint-100");
    let fragment = "adapters lie below it in checkpoint-100/, checkpoint-20/: give one of those";
    assert_error(check(output.path(), &base(), LIMITS), fragment);
    assert_eq!(check(&only, &base(), LIMITS).unwrap().directory, only);
}

#[test]
fn an_adapter_beside_its_checkpoints_is_itself() {
    let peft = Peft::new();
    peft.write();
    below(peft.path(), "checkpoint-20");
    let receipt = check(peft.path(), &base(), LIMITS).unwrap();
    assert_eq!(receipt.directory, peft.path());
    assert!(receipt.notes.is_empty());
    fs::remove_file(peft.config_path()).unwrap();
    assert_error(check(peft.path(), &base(), LIMITS), "adapters lie below it");
}

#[cfg(unix)]
#[test]
fn a_link_is_no_checkpoint() {
    let (output, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let adapter = below(elsewhere.path(), "adapter");
    std::os::unix::fs::symlink(adapter, output.path().join("checkpoint-20")).unwrap();
    assert_error(
        check(output.path(), &base(), LIMITS),
        "adapter_config.json does not exist",
    );
}
