//! Directories and files that are missing, cut short, or changed since they were registered, and their refusals.

mod common;

use std::fs;

use common::{LIMITS, NUM_LAYERS, Peft, assert_error, assert_refused, base};
use loraserve_adapters::{ErrorKind, check, load};
use serde_json::json;

#[test]
fn missing_directory_is_refused() {
    let missing = Peft::new().path().join("nowhere");
    assert_error(check(&missing, &base(), LIMITS), "nowhere does not exist");
}

#[test]
fn file_in_place_of_the_directory_is_refused() {
    let peft = Peft::new();
    peft.write();
    assert_error(
        check(&peft.weights_path(), &base(), LIMITS),
        "is not a directory",
    );
}

#[test]
fn missing_config_is_refused() {
    let peft = Peft::new();
    peft.write();
    fs::remove_file(peft.config_path()).unwrap();
    assert_error(peft.check_written(), "adapter_config.json does not exist");
}

#[test]
fn missing_weights_are_refused() {
    let peft = Peft::new();
    peft.write();
    fs::remove_file(peft.weights_path()).unwrap();
    assert_error(
        peft.check_written(),
        "adapter_model.safetensors does not exist",
    );
}

#[test]
fn pickle_in_place_of_safetensors_is_refused() {
    let peft = Peft::new();
    peft.write();
    fs::rename(peft.weights_path(), peft.path().join("adapter_model.bin")).unwrap();
    let fragment = "adapter_model.bin: pickle files are not loaded; convert to safetensors";
    assert_error(peft.check_written(), fragment);
}

#[test]
fn directory_in_place_of_the_weights_is_refused() {
    let peft = Peft::new();
    peft.write();
    fs::remove_file(peft.weights_path()).unwrap();
    fs::create_dir(peft.weights_path()).unwrap();
    assert_error(
        peft.check_written(),
        "adapter_model.safetensors is not a file",
    );
}

#[test]
fn config_that_is_not_json_is_refused() {
    let peft = Peft::new();
    peft.write();
    fs::write(peft.config_path(), "{\"r\": ").unwrap();
    assert_error(
        peft.check_written(),
        "adapter_config.json is not a valid adapter config",
    );
}

#[test]
fn config_that_is_not_an_object_is_refused() {
    let peft = Peft::new();
    peft.write();
    fs::write(peft.config_path(), "[1]").unwrap();
    assert_error(peft.check_written(), "expected a JSON object");
}

#[test]
fn config_of_a_megabyte_is_refused() {
    let peft = Peft::new();
    peft.write();
    fs::write(peft.config_path(), " ".repeat((1 << 20) + 1)).unwrap();
    assert_error(
        peft.check_written(),
        "it has 1048577 bytes, limit is 1048576",
    );
}

#[test]
fn truncated_weights_are_refused() {
    let peft = Peft::new();
    peft.write();
    let weights = peft.weights();
    fs::write(peft.weights_path(), &weights[..weights.len() - 1]).unwrap();
    assert_error(peft.check_written(), "its header promises");
}

#[test]
fn weights_with_trailing_bytes_are_refused() {
    let peft = Peft::new();
    peft.write();
    fs::write(peft.weights_path(), [peft.weights(), vec![0]].concat()).unwrap();
    assert_error(peft.check_written(), "its header promises");
}

#[test]
fn empty_weights_file_is_refused() {
    let peft = Peft::new();
    peft.write();
    fs::write(peft.weights_path(), []).unwrap();
    assert_error(peft.check_written(), "is empty: get the file itself again");
}

#[test]
fn header_longer_than_the_file_is_refused() {
    let peft = Peft::new();
    peft.write();
    fs::write(peft.weights_path(), 1000_u64.to_le_bytes()).unwrap();
    assert_error(
        peft.check_written(),
        "header of 1000 bytes in a file of 8: truncated",
    );
}

#[test]
fn header_above_the_limit_is_refused_without_reading_it() {
    let peft = Peft::new();
    peft.write();
    fs::write(peft.weights_path(), u64::MAX.to_le_bytes()).unwrap();
    assert_error(peft.check_written(), "limit is 16777216");
}

#[test]
fn file_without_tensors_is_refused() {
    assert_refused(
        |peft| peft.tensors.clear(),
        "has no tensors: the adapter would do nothing",
    );
}

#[test]
fn changed_and_deleted_adapters_are_unavailable_when_loaded() {
    let mut peft = Peft::new();
    let receipt = peft.check().unwrap();
    let mut extent = vec![0; receipt.nbytes];
    let mut reload = |peft: &Peft| {
        load(peft.path(), &base(), LIMITS, &receipt.hash, &mut extent).map_err(|error| error.kind())
    };
    assert!(reload(&peft).is_ok());
    peft.config["lora_alpha"] = json!(9);
    peft.write();
    assert_eq!(reload(&peft), Err(ErrorKind::Unavailable));
    fs::remove_file(peft.weights_path()).unwrap();
    assert_eq!(reload(&peft), Err(ErrorKind::Unavailable));
    fs::remove_dir_all(peft.path()).unwrap();
    assert_eq!(reload(&peft), Err(ErrorKind::Unavailable));
}

#[test]
fn adapter_that_grew_out_of_its_extent_is_refused_as_changed() {
    let mut peft = Peft::new();
    let receipt = peft.check().unwrap();
    for layer in 0..NUM_LAYERS {
        peft.add_module(layer, "mlp.down_proj", 4);
    }
    peft.config["target_modules"] = json!(["q_proj", "v_proj", "down_proj"]);
    assert!(peft.check().unwrap().nbytes > receipt.nbytes);
    let mut extent = vec![0; receipt.nbytes];
    let loaded = load(peft.path(), &base(), LIMITS, &receipt.hash, &mut extent);
    assert_error(loaded, "changed on disk since it was registered");
}

#[test]
fn extent_that_is_too_small_is_refused() {
    let peft = Peft::new();
    let receipt = peft.check().unwrap();
    let mut extent = vec![0; receipt.nbytes - 1];
    let error = load(peft.path(), &base(), LIMITS, &receipt.hash, &mut extent).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Capacity);
    assert!(
        error
            .to_string()
            .contains(&format!("needs {} bytes", receipt.nbytes))
    );
}
