//! What people hand over in place of an adapter, and the words it is refused with.

mod common;

use std::fs;
use std::path::Path;

use common::{LIMITS, Peft, assert_error, base};
use loraserve_adapters::{Expected, check, recognise};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const POINTER: &[u8] = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n";

/// Asserts that a valid adapter's directory, once rearranged, is refused with `fragment`.
fn assert_directory_refused(rearrange: impl FnOnce(&Path), fragment: &str) {
    let peft = Peft::new();
    peft.write();
    rearrange(peft.path());
    assert_error(peft.check_written(), fragment);
}

fn tar() -> Vec<u8> {
    let mut head = vec![0; 512];
    head[..7].copy_from_slice(b"a/b.txt");
    head[257..262].copy_from_slice(b"ustar");
    head
}

#[test]
fn foreign_content_is_named_with_its_remedy() {
    let tar = tar();
    let html: &[u8] = b"\n<!DOCTYPE html><html>";
    let cases: &[(&[u8], &str)] = &[
        (b"", "is empty: get the file itself again"),
        (
            POINTER,
            "is a git-lfs pointer, not the file it stands for: run 'git lfs pull'",
        ),
        (b"# xet version 0\n", "is a Xet pointer"),
        (
            html,
            "is an HTML page that a download saved under this name",
        ),
        (
            b"Entry not found",
            "is text that begins with \"Entry not found\"",
        ),
        (
            b"GGUF\x03\0\0\0",
            "is a GGUF file: hand over the PEFT directory it was made from",
        ),
        (b"\x93NUMPY\x01\0", "is a NumPy array"),
        (
            b"PK\x03\x04\x14\0\0\0\0\0adapter/x.json",
            "is a zip archive: unpack it",
        ),
        (
            b"PK\x03\x04\0\0\x08\x08archive/data.pkl",
            "is a pickle, which is not loaded: convert to safetensors",
        ),
        (b"\x80\x04\x95\0\0", "is a pickle"),
        (b"\x1f\x8b\x08\0\0\0\0\0", "is a gzip archive: unpack it"),
        (&tar, "is a tar archive: unpack it"),
    ];
    for (content, fragment) in cases {
        for name in [CONFIG, WEIGHTS] {
            assert_directory_refused(
                |path| fs::write(path.join(name), content).unwrap(),
                &format!("{name} {fragment}"),
            );
        }
    }
    let json = br#"{"error": "Repository not found"}"#;
    assert_directory_refused(
        |path| fs::write(path.join(WEIGHTS), json).unwrap(),
        "is text that begins with",
    );
    let utf16 = b"\xff\xfe{\0}\0";
    assert_directory_refused(
        |path| fs::write(path.join(CONFIG), utf16).unwrap(),
        "is text in UTF-16: save it as UTF-8",
    );
    let marked = b"\xef\xbb\xbf{}";
    assert_directory_refused(
        |path| fs::write(path.join(CONFIG), marked).unwrap(),
        "begins with a byte order mark",
    );
}

#[test]
fn what_is_right_is_not_taken_for_foreign() {
    let peft = Peft::new();
    assert_eq!(recognise(&peft.weights(), Expected::Binary), None);
    assert_eq!(
        recognise(br#" {"peft_type": "LORA"}"#, Expected::Json),
        None
    );
    let cut_character = [&[b'['; 511][..], "é".as_bytes()].concat();
    assert_eq!(recognise(&cut_character, Expected::Json), None);
}

/// What was done to an adapter's directory.
type Rearrange = Box<dyn Fn(&Path)>;

fn rename(from: &'static str, to: &'static str) -> Rearrange {
    Box::new(move |path| fs::rename(path.join(from), path.join(to)).unwrap())
}

/// Both files moved to each of `directories`.
fn below(directories: &'static [&'static str]) -> Rearrange {
    Box::new(move |path| {
        for directory in directories {
            fs::create_dir(path.join(directory)).unwrap();
            for name in [CONFIG, WEIGHTS] {
                fs::copy(path.join(name), path.join(directory).join(name)).unwrap();
            }
        }
        fs::remove_file(path.join(CONFIG)).unwrap();
        fs::remove_file(path.join(WEIGHTS)).unwrap();
    })
}

/// The directory holds these files and nothing else.
fn only(names: &'static [&'static str]) -> Rearrange {
    Box::new(move |path| {
        fs::remove_file(path.join(CONFIG)).unwrap();
        fs::remove_file(path.join(WEIGHTS)).unwrap();
        for name in names {
            fs::write(path.join(name), "x").unwrap();
        }
    })
}

#[test]
fn what_lies_in_the_directory_instead_is_named_with_its_remedy() {
    let cases: Vec<(Rearrange, &str)> = vec![
        (
            below(&["checkpoint-500", "checkpoint-1000"]),
            "adapters lie below it in checkpoint-1000/, checkpoint-500/: give one of those",
        ),
        (
            below(&["my-adapter", "my-adapter-2"]),
            "adapters lie below it in my-adapter-2/, my-adapter/",
        ),
        (
            rename(WEIGHTS, "adapter_model.bin.index.json"),
            "pickle files are not loaded; convert to safetensors",
        ),
        (
            rename(WEIGHTS, "adapter_model.pt"),
            "save_file(torch.load(\"adapter_model.pt\", weights_only=True), \"adapter_model.safetensors\")",
        ),
        (
            rename(WEIGHTS, "Adapter_Model.safetensors"),
            "rename it to \"adapter_model.safetensors\"",
        ),
        (
            rename(CONFIG, "Adapter_Config.json"),
            "rename it to \"adapter_config.json\"",
        ),
        (
            rename(WEIGHTS, "lora.gguf"),
            "is a GGUF file: give that file itself as the adapter",
        ),
        (
            only(&["model.lora_config.npy"]),
            "TensorRT-LLM's form of an adapter: give a directory with its two arrays",
        ),
        (
            rename(WEIGHTS, "adapters.safetensors"),
            "MLX's form of an adapter",
        ),
        (only(&["adapter.zip"]), "is an archive: unpack it"),
        (only(&["adapter.tar.gz"]), "is an archive: unpack it"),
        (
            only(&["config.json", "model.safetensors", "tokenizer.json"]),
            "\"config.json\" is of a whole model, not of an adapter: a full fine-tune is served as the model",
        ),
        (
            rename(WEIGHTS, "model.safetensors"),
            "\"model.safetensors\" is of a whole model",
        ),
        (
            rename(WEIGHTS, "lora.safetensors"),
            "it holds \"adapter_config.json\", \"lora.safetensors\"",
        ),
        (only(&[]), "the directory is empty"),
        (
            only(&["a", "b", "c", "d", "e", "f", "g"]),
            "\"e\" and 2 more",
        ),
    ];
    for (rearrange, fragment) in cases {
        assert_directory_refused(rearrange, fragment);
    }
}

#[test]
fn a_file_given_as_an_adapter_is_refused_with_what_to_give() {
    let peft = Peft::new();
    peft.write();
    let cases: &[(&str, &[u8], &str)] = &[
        (
            WEIGHTS,
            b"x",
            "is not a directory: give the directory that holds it",
        ),
        (CONFIG, b"x", "give the directory that holds it"),
        ("a.gguf", b"GGUF", "is not a directory: it is a GGUF file"),
        ("a.zip", b"PK\x03\x04", "it is a zip archive: unpack it"),
        ("a.tar", &tar(), "it is a tar archive: unpack it"),
        ("a.npy", b"\x93NUMPY", "it is a NumPy array"),
        (
            "a",
            b"\x01\x02",
            "an adapter is a directory with adapter_config.json and",
        ),
    ];
    for (name, content, fragment) in cases {
        let path = peft.path().join(name);
        fs::write(&path, content).unwrap();
        assert_error(check(&path, &base(), LIMITS), fragment);
    }
}

#[test]
fn weights_beside_the_adapter_that_would_change_it_are_refused() {
    for name in [
        "new_embeddings.safetensors",
        "new_embeddings.bin",
        "non_lora_trainables.bin",
    ] {
        assert_directory_refused(
            |path| fs::write(path.join(name), "x").unwrap(),
            &format!("{name} beside the adapter"),
        );
    }
}
