//! Files that are cut, lie about themselves, or lack a tensor: an error that names it.

use std::path::PathBuf;

use super::*;

/// A golden checkpoint's config and tensors.
fn golden(name: &str) -> (Vec<u8>, Vec<u8>) {
    let folder = folder(name);
    let read = |file: &str| std::fs::read(folder.join(file)).expect("a golden file");
    (read("config.json"), read("model.safetensors"))
}

fn folder(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/logits");
    root.join(name)
}

fn refusal(config: &[u8], tensors: Vec<u8>) -> EngineError {
    match Checkpoint::from_bytes(config, tensors) {
        Ok(_) => panic!("a bad checkpoint was opened"),
        Err(error) => error,
    }
}

/// Replaces text of the header by text of the same length.
fn patch(tensors: &[u8], from: &str, to: &str) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let at = tensors
        .windows(from.len())
        .position(|window| window == from.as_bytes());
    let at = at.expect("the header holds it");
    let mut tensors = tensors.to_vec();
    tensors[at..at + to.len()].copy_from_slice(to.as_bytes());
    tensors
}

#[test]
fn every_golden_layout_opens() {
    for (name, experts, vectors) in [
        ("plain", MatrixFormat::Mxfp4, VectorFormat::Bf16),
        ("original", MatrixFormat::Mxfp4, VectorFormat::Bf16),
        ("bf16", MatrixFormat::Bf16, VectorFormat::Bf16),
        ("sharded", MatrixFormat::Mxfp4, VectorFormat::F32),
    ] {
        let checkpoint = Checkpoint::open(&folder(name)).expect("it opens");
        let format = checkpoint.weight_format(Precision::Stored);
        let expected = Precision::Stored.formats(experts, vectors);
        assert_eq!(format, expected, "{name}");
    }
}

#[test]
fn what_is_read_from_a_file_is_what_is_mapped() {
    for name in ["original", "sharded"] {
        let checkpoint = Checkpoint::open(&folder(name)).expect("it opens");
        for tensor in [checkpoint.lm_head(), checkpoint.final_norm()] {
            let tensor = tensor.expect("it is there");
            assert!(tensor.file.is_some());
            let (start, end) = (3, tensor.bytes.len() - 5);
            let mut bytes = vec![0; end - start];
            tensor.read(start, &mut bytes).expect("it is read");
            assert!(bytes == tensor.bytes[start..end], "{name}: {}", tensor.name);
        }
    }
}

#[test]
fn every_cut_is_refused() {
    let (config, tensors) = golden("plain");
    let header = u64::from_le_bytes(*tensors.first_chunk().expect("it is long")) as usize + 8;
    let mut cuts = vec![
        0,
        1,
        7,
        8,
        9,
        header - 1,
        header,
        header + 1,
        tensors.len() - 1,
    ];
    cuts.extend((0..header).step_by(97));
    for cut in cuts {
        let error = refusal(&config, tensors[..cut].to_vec());
        assert!(
            matches!(error, EngineError::Checkpoint(_)),
            "{cut}: {error}"
        );
    }
    let mut longer = tensors;
    longer.push(0);
    let error = refusal(&config, longer);
    assert!(error.to_string().contains("bytes long"), "{error}");
}

#[test]
fn a_header_may_not_lie_about_its_length() {
    let (config, mut tensors) = golden("plain");
    for length in [
        u64::MAX,
        u64::MAX - 7,
        1 << 40,
        100_000_001,
        tensors.len() as u64 - 7,
        0,
    ] {
        tensors[..8].copy_from_slice(&length.to_le_bytes());
        let error = refusal(&config, tensors.clone());
        assert!(
            matches!(error, EngineError::Checkpoint(_)),
            "{length}: {error}"
        );
    }
}

#[test]
fn offsets_that_wrap_are_refused() {
    let (config, _) = golden("plain");
    // The end of the tensor plus the header's length comes round to the file's length.
    for extra in 0..16u64 {
        let end = u64::MAX - 200 + extra;
        let header = format!(
            r#"{{"model.norm.weight":{{"dtype":"U8","shape":[{end}],"data_offsets":[0,{end}]}}}}"#
        );
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        for n in 0..300 {
            let mut file = file.clone();
            file.resize(file.len() + n, 0);
            let error = refusal(&config, file);
            assert!(matches!(error, EngineError::Checkpoint(_)), "{error}");
        }
    }
}

#[test]
fn tensors_are_checked_by_name() {
    let (config, tensors) = golden("plain");
    let renamed = patch(
        &tensors,
        "model.layers.1.self_attn.sinks",
        "model.layers.1.self_attn.sinkz",
    );
    let error = refusal(&config, renamed).to_string();
    assert_eq!(
        error,
        "tensor `model.layers.1.self_attn.sinks` is missing from `model.safetensors`"
    );

    let text = String::from_utf8(config.clone()).expect("JSON");
    let wider = text.replace("\"vocab_size\": 96", "\"vocab_size\": 97");
    assert_ne!(text, wider);
    let error = refusal(wider.as_bytes(), tensors.clone()).to_string();
    assert!(
        error.contains("`model.embed_tokens.weight`") && error.contains("expected [97, 32]"),
        "{error}"
    );

    // The same width, another meaning.
    let other = String::from_utf8_lossy(&tensors[8..])
        .find("\"BF16\"")
        .expect("there are bf16");
    let mut retyped = tensors.clone();
    retyped[8 + other..8 + other + 6].copy_from_slice(b"\"F16\" ");
    let error = refusal(&config, retyped).to_string();
    assert!(error.contains("dtype F16, expected BF16"), "{error}");
}

#[test]
fn a_bad_scale_byte_is_named_at_load() {
    let (config, tensors) = golden("plain");
    let checkpoint = Checkpoint::from_bytes(&config, tensors.clone()).expect("it opens");
    let layer = checkpoint.layer(1).expect("complete");
    let ExpertTensors::Mxfp4 { scales, .. } = &layer.down else {
        panic!("the golden holds MXFP4");
    };
    let name = scales.name.clone();
    let range = checkpoint.tensors[&name].range.clone();
    for byte in [255, 254, 253, 1, 0] {
        let mut tensors = tensors.clone();
        tensors[range.start + 5] = byte;
        let checkpoint = Checkpoint::from_bytes(&config, tensors).expect("it opens");
        let error = crate::engine::cpu::model::CpuModel::load(&checkpoint, Precision::Stored);
        let Err(EngineError::Checkpoint(CheckpointError::Scale {
            tensor,
            block,
            byte: found,
            ..
        })) = error
        else {
            panic!("scale byte {byte} was loaded");
        };
        assert_eq!((tensor, block, found), (name.clone(), 5, byte));
    }
}

#[test]
fn an_index_may_not_lead_out_of_its_folder() {
    let temporary = std::env::temp_dir().join(format!("podium-index-{}", std::process::id()));
    std::fs::create_dir_all(&temporary).expect("a temporary folder");
    let (config, _) = golden("plain");
    std::fs::write(temporary.join("config.json"), config).expect("it is written");
    let index = temporary.join("model.safetensors.index.json");
    for (text, expected) in [
        (
            r#"{"weight_map": {"a": "../x.safetensors"}}"#,
            "has a folder in it",
        ),
        (
            r#"{"weight_map": {"a": "/etc/passwd"}}"#,
            "has a folder in it",
        ),
        (r#"{"weight_map": {"a": 3}}"#, "is no text"),
        (r#"{"weights": {}}"#, "no `weight_map`"),
        ("{", "is not a weight index"),
        (
            r#"{"weight_map": {"a": "absent.safetensors"}}"#,
            "cannot read",
        ),
    ] {
        std::fs::write(&index, text).expect("it is written");
        let error = match Checkpoint::open(&temporary) {
            Ok(_) => panic!("a bad index was read"),
            Err(error) => error.to_string(),
        };
        assert!(error.contains(expected), "{error}");
    }
    std::fs::remove_file(&index).expect("it was there");
    let error = Checkpoint::open(&temporary)
        .err()
        .expect("there are no files")
        .to_string();
    assert!(error.contains("holds no `*.safetensors` file"), "{error}");
    std::fs::remove_dir_all(&temporary).expect("it was there");
}
