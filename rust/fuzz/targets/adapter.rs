//! An adapter's directory: config, then the header of its weights, whose data is as long as the header says.
#![no_main]

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use loraserve_adapters::{BaseShape, FactorDtype, Limits, StorageDtype, check, load};
use loraserve_fuzz::{base, bounded, parts};
use serde_json::Value;

const MAX_DATA_NBYTES: u64 = 1 << 20;
const EXTENT_NBYTES: usize = 1 << 16;
const LIMITS: Limits = Limits {
    dtype: StorageDtype::Float32,
    factors: FactorDtype::Storage,
    max_lora_rank: 64,
};

static SHAPE: LazyLock<BaseShape> = LazyLock::new(base);

/// In memory where the machine has such a place.
static DIRECTORY: LazyLock<PathBuf> = LazyLock::new(|| {
    let memory = PathBuf::from("/dev/shm");
    let parent = if memory.is_dir() {
        memory
    } else {
        env::temp_dir()
    };
    let path = parent.join(format!("loraserve-fuzz-{}", process::id()));
    fs::create_dir_all(&path).expect("a directory for the adapter");
    path
});

fuzz_target!(|data: &[u8]| {
    let mut parts = parts(data);
    let (config, header) = (
        parts.next().unwrap_or_default(),
        parts.next().unwrap_or_default(),
    );
    fs::write(DIRECTORY.join("adapter_config.json"), config).expect("a config");
    fs::write(DIRECTORY.join("adapter_model.safetensors"), weights(header)).expect("weights");
    bounded(|| {
        if let Ok(receipt) = check(&DIRECTORY, &SHAPE, LIMITS) {
            let mut extent = vec![0; EXTENT_NBYTES];
            // It may be too large for the extent, and is refused then.
            let _ = load(&DIRECTORY, &SHAPE, LIMITS, &receipt.hash, &mut extent);
        }
    });
});

fn weights(header: &[u8]) -> Vec<u8> {
    let length = (header.len() as u64).to_le_bytes();
    let nbytes = data_nbytes(header).filter(|&nbytes| nbytes <= MAX_DATA_NBYTES);
    let data = vec![0; nbytes.unwrap_or(0) as usize];
    [&length, header, &data].concat()
}

/// Where the last tensor ends.
fn data_nbytes(header: &[u8]) -> Option<u64> {
    let header: Value = serde_json::from_slice(header).ok()?;
    let ends = header.as_object()?.values();
    ends.filter_map(|tensor| tensor["data_offsets"][1].as_u64())
        .max()
}
