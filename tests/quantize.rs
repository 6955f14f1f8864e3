//! `podium quantize`: what it writes is read back with the same values, by every layout's way.

#![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

mod support;

use std::path::Path;

use podium::engine::checkpoint::{ByClass, Checkpoint, Precision};
use podium::engine::cpu::CpuBackend;
use podium::quant::mxfp4;
use safetensors::SafeTensors;
use support::{Scratch, root, run, run_ok};

const BLOCK_BYTES: usize = mxfp4::BLOCK_BYTES;

fn quantize(scratch: &Scratch, input: &str, output: &str, flags: &str) {
    let mut args = vec!["quantize", input, output, "--quiet"];
    args.extend(flags.split_whitespace());
    run_ok(scratch.path(), &args);
}

/// Codes and scales of every expert block of a checkpoint of one file, by tensor and place.
fn blocks(folder: &Path) -> Vec<(String, u8, [u8; BLOCK_BYTES])> {
    let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut names: Vec<&str> = file.names().into_iter().collect();
    names.retain(|name| name.ends_with("_blocks"));
    names.sort_unstable();
    let mut blocks = Vec::new();
    for name in names {
        let scales = file.tensor(&name.replace("_blocks", "_scales")).unwrap();
        let codes = file.tensor(name).unwrap();
        let codes = codes.data().as_chunks::<BLOCK_BYTES>().0;
        assert_eq!(codes.len(), scales.data().len());
        for (codes, &scale) in codes.iter().zip(scales.data()) {
            blocks.push((name.to_owned(), scale, *codes));
        }
    }
    blocks
}

/// A lively checkpoint of which a third of the blocks are not as the quantizer would write them:
/// small codes under a large scale, and zeros under any scale.
fn unusual_checkpoint(folder: &Path) {
    support::checkpoint::write(folder, 5);
    let path = folder.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let start = bytes.as_ptr() as usize;
    let ranges: Vec<std::ops::Range<usize>> = {
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.tensors();
        let blocks = tensors.iter().filter(|(name, _)| name.ends_with("_blocks"));
        let range = |data: &[u8]| {
            let at = data.as_ptr() as usize - start;
            at..at + data.len()
        };
        blocks.map(|(_, tensor)| range(tensor.data())).collect()
    };
    for range in ranges {
        let codes = bytes[range].as_chunks_mut::<BLOCK_BYTES>().0;
        for (i, codes) in codes.iter_mut().enumerate() {
            match i % 6 {
                // Halves and zeros of both signs alone.
                1 => codes.iter_mut().for_each(|byte| *byte &= 0x99),
                4 => codes.iter_mut().for_each(|byte| *byte &= 0x88),
                _ => {}
            }
        }
    }
    std::fs::write(path, bytes).unwrap();
}

/// Whether the quantizer would write the block so.
fn is_canonical(scale: u8, codes: &[u8; BLOCK_BYTES]) -> bool {
    let largest = codes.iter().map(|byte| (byte & 7).max(byte >> 4 & 7)).max();
    match largest {
        Some(0) => scale == 127,
        // 4 and 6 have E2M1's largest exponent.
        largest => largest >= Some(6),
    }
}

#[test]
fn there_and_back_keeps_every_value_and_the_bytes_of_canonical_blocks() {
    let scratch = Scratch::new("quantize");
    unusual_checkpoint(&scratch.join("four"));
    quantize(&scratch, "four", "sixteen", "--precision 16bit");
    quantize(&scratch, "sixteen", "again", "--precision 4bit");
    let (before, after) = (
        blocks(&scratch.join("four")),
        blocks(&scratch.join("again")),
    );
    assert_eq!(before.len(), after.len());
    let (mut n_canonical, mut n_changed) = (0, 0);
    for ((name, scale, codes), (other, scale_after, codes_after)) in before.iter().zip(&after) {
        assert_eq!(name, other);
        let values = mxfp4::unpack(*scale, codes);
        let values_after = mxfp4::unpack(*scale_after, codes_after);
        for (a, b) in values.iter().zip(&values_after) {
            assert_eq!(a.to_bits(), b.to_bits(), "{name}");
        }
        let same = (scale, codes) == (scale_after, codes_after);
        if is_canonical(*scale, codes) {
            assert!(same, "{name}: a canonical block has other bytes");
            n_canonical += 1;
        }
        n_changed += usize::from(!same);
    }
    assert!(
        n_canonical > before.len() / 2 && n_changed > before.len() / 5,
        "{n_canonical} canonical, {n_changed} changed of {}",
        before.len()
    );
    // Written in its own precision, nothing changes at all.
    quantize(&scratch, "four", "copy", "--precision 4bit");
    assert_eq!(before, blocks(&scratch.join("copy")));
}

#[test]
fn nano_comes_back_byte_for_byte() {
    let scratch = Scratch::new("quantize-nano");
    quantize(&scratch, "nano", "sixteen", "--precision 16bit");
    quantize(&scratch, "sixteen", "four", "--precision 4bit");
    let (ours, nano) = (scratch.join("four"), root().join("models/nano"));
    assert_eq!(blocks(&ours), blocks(&nano));
    for file in [
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ] {
        let read = |folder: &Path| std::fs::read(folder.join(file)).unwrap();
        assert_eq!(read(&ours), read(&nano), "{file}");
    }
    // A run takes the folder as it takes nano.
    let dataset = root().join("datasets/nano/sums.jsonl");
    for (model, out) in [("nano", "a"), ("four", "b"), ("sixteen", "c")] {
        let args = [
            "eval",
            dataset.to_str().unwrap(),
            "--model",
            model,
            "--profile",
            "nano",
            "--limit",
            "6",
            "--quiet",
            "--trace-hash",
            "--max-new-tokens",
            "200",
            "--out",
            out,
        ];
        run_ok(scratch.path(), &args);
    }
    let bits = |out: &str| support::bits(&scratch.join(out));
    assert_eq!(bits("a"), bits("b"));
    assert_eq!(bits("a"), bits("c"));
}

/// OpenAI's layout, bf16 experts and shards, each written in both precisions and in small files,
/// give the logits that the input gives.
#[test]
fn every_layout_keeps_its_logits() {
    let scratch = Scratch::new("quantize-layouts");
    for case in ["original", "bf16", "sharded", "odd", "clamp"] {
        let folder = root().join("tests/golden/logits").join(case);
        let input = folder.join("input.jsonl");
        let logits = |model: &str, precision: &str| {
            let args = [
                "logits",
                model,
                input.to_str().unwrap(),
                "--full",
                "--exact",
                "--precision",
                precision,
            ];
            run_ok(scratch.path(), &args).stdout
        };
        let folder = folder.to_str().unwrap();
        for precision in ["4bit", "16bit"] {
            let out = format!("{case}-{precision}");
            let flags = format!("--precision {precision} --shard-size 50kB");
            quantize(&scratch, folder, &out, &flags);
            let index = scratch.join(&out).join("model.safetensors.index.json");
            assert!(index.is_file(), "{out} is in several files");
            // Quantized while loading or beforehand: the same.
            let loaded = logits(folder, precision);
            assert_eq!(logits(&out, "stored"), loaded, "{out}");
            assert_eq!(logits(&out, precision), loaded, "{out}");
        }
    }
}

#[test]
fn what_it_cannot_do_it_says_and_leaves_nothing() {
    let scratch = Scratch::new("quantize-errors");
    scratch.write("full/file", "x");
    let fails = |args: &[&str], words: &[&str]| {
        let output = run(scratch.path(), args);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{text}");
        for word in words {
            assert!(text.contains(word), "{word}: {text}");
        }
    };
    let to = |out: &'static str, precision: &'static str| {
        ["quantize", "nano", out, "--precision", precision]
    };
    fails(&to("full", "4bit"), &["`full` is not empty", "hint:"]);
    fails(&to("out", "8bit"), &["`8bit` has no file layout", "4bit"]);
    fails(&to("out", "5bit"), &["unknown precision `5bit`"]);
    assert!(!scratch.join("out").exists());
    // A value that no format can hold is found by name, and no half of a file stays.
    let bf16 = root().join("tests/golden/logits/bf16");
    std::fs::create_dir(scratch.join("bad")).unwrap();
    std::fs::copy(bf16.join("config.json"), scratch.join("bad/config.json")).unwrap();
    let mut bytes = std::fs::read(bf16.join("model.safetensors")).unwrap();
    let at = {
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let name = "model.layers.1.mlp.experts.down_proj";
        let data = file.tensor(name).unwrap().data().as_ptr() as usize;
        data - bytes.as_ptr() as usize
    };
    bytes[at..at + 2].copy_from_slice(&0x7F80u16.to_le_bytes());
    std::fs::write(scratch.join("bad/model.safetensors"), bytes).unwrap();
    fails(
        &["quantize", "bad", "worse", "--precision", "4bit"],
        &["model.layers.1.mlp.experts.down_proj", "not finite"],
    );
    assert_eq!(std::fs::read_dir(scratch.join("worse")).unwrap().count(), 0);
}

/// A device that packs the weights itself has the same figure in its ledger.
#[test]
fn the_error_of_quantizing_is_the_same_wherever_it_is_measured() {
    let folder = root().join("tests/golden/logits/bf16");
    let checkpoint = Checkpoint::open(&folder).unwrap();
    for precision in [Precision::Bits4, Precision::Bits8, Precision::Bits4Dense4] {
        let loaded = CpuBackend::load(&checkpoint, precision, 2).unwrap();
        assert!(loaded.deviation().experts.relative() > 0.0);
        let measured = checkpoint.deviation(checkpoint.weight_format(precision));
        for ((class, a), (_, b)) in loaded
            .deviation()
            .classes()
            .into_iter()
            .zip(measured.unwrap().classes())
        {
            let (a, b) = (a.relative(), b.relative());
            assert!(
                (a - b).abs() <= 1e-12,
                "{class} in {precision:?}: {a} and {b}"
            );
        }
    }
    let stored = checkpoint.deviation(checkpoint.weight_format(Precision::Stored));
    assert_eq!(stored.unwrap(), ByClass::default());
}
