//! Verdicts on branches of every kind.

use super::*;
use crate::{Bits, GroupSize, LinearShape};
use Client::*;

/// Returns a branch of one linear layer with default settings.
fn contents(bits: Bits, group_size: i64) -> Contents {
    let linear = LinearShape {
        in_features: 4096,
        out_features: 11008,
        bits,
        group_size: GroupSize::try_from(group_size).unwrap(),
    };
    Contents {
        linears: vec![linear],
        sym: true,
        format: CheckpointFormat::Gptq,
        gguf: false,
        desc_act: false,
        static_groups: true,
        scattered: false,
        mixed: false,
        skips: false,
        listed: false,
        parted: false,
        stray: false,
        names: ModuleNames::default(),
        damp_percent: Some(0.1),
    }
}

#[test]
fn names_that_readers_change_and_experts_are_known() {
    for (module, renamed, experts) in [
        ("model.layers.0.mlp.gate_up_proj", true, false),
        (
            "language_model.model.layers.3.self_attn.q_proj",
            true,
            false,
        ),
        ("model.layers.0.mlp.gate_proj", false, false),
        ("model.layers.0.self_attn.qkv_proj", false, false),
        ("model.layers.0.mlp.experts.3.up_proj", false, true),
        ("model.layers.0.mlp.shared_experts.up_proj", false, false),
        ("model.layers.0.block_sparse_moe.experts.3.w1", true, true),
    ] {
        assert_eq!(
            ModuleNames::of([module]),
            ModuleNames { renamed, experts },
            "{module}"
        );
    }
}

fn loaders(contents: &Contents) -> Vec<Client> {
    let support = client_support(contents).into_iter();
    let loads = support.filter(|s| s.verdict.is_ok());
    loads.map(|s| s.client).collect()
}

/// Verdicts observed on 2026-11-30 for branches of a small model in the versions that `tried`
/// names, and those from reading the source.
#[test]
fn verdicts_are_what_was_seen_in_each_client() {
    use Bits::*;
    // Programs that load the files as they are; converters have a test of their own.
    let all = &Client::ALL[..7];
    let act = |bits, group| Contents {
        desc_act: true,
        static_groups: false,
        scattered: group != -1,
        ..contents(bits, group)
    };
    let asym = |desc_act| Contents {
        sym: false,
        format: CheckpointFormat::GptqV2,
        desc_act,
        scattered: desc_act,
        ..contents(Four, 128)
    };
    let flagged = Contents {
        desc_act: true,
        ..contents(Four, 128)
    };
    let mixed = |skips| Contents {
        mixed: true,
        skips,
        ..contents(Four, 128)
    };
    let skipped = Contents {
        skips: true,
        ..contents(Four, 128)
    };
    let damped = |damp| Contents {
        damp_percent: Some(damp),
        ..contents(Four, 128)
    };
    let named = |renamed, experts| Contents {
        names: ModuleNames { renamed, experts },
        ..contents(Four, 128)
    };
    for (branch, what, expected) in [
        (contents(Four, 128), "w4g128_noact", all),
        (
            named(true, false),
            "phi3, glm4, gemma3, mistral3",
            &all[1..],
        ),
        (named(true, true), "mixtral", &all[2..]),
        (
            named(false, true),
            "qwen3_moe, olmoe",
            &[GptqModel, AutoRound, ExLlama, Vllm, SgLang, Tgi],
        ),
        (contents(Four, 32), "w4g32_noact", all),
        (
            act(Four, 128),
            "w4g128_act",
            &[GptqModel, Transformers, ExLlama, SgLang, Tgi],
        ),
        (
            act(Four, -1),
            "w4g-1_act",
            &[GptqModel, Transformers, ExLlama, Vllm, SgLang, Tgi],
        ),
        (
            contents(Eight, 128),
            "w8g128_noact",
            &[GptqModel, Transformers, AutoRound, Vllm, SgLang],
        ),
        (
            act(Eight, -1),
            "w8g-1_act",
            &[GptqModel, Transformers, Vllm, SgLang],
        ),
        (
            act(Eight, 128),
            "w8g128_act",
            &[GptqModel, Transformers, SgLang],
        ),
        (
            contents(Three, 128),
            "w3g128_noact",
            &[GptqModel, Transformers, AutoRound, SgLang],
        ),
        (
            contents(Two, 64),
            "w2g64_noact",
            &[GptqModel, Transformers, AutoRound, SgLang],
        ),
        (
            asym(true),
            "w4g128_asym_act",
            &[GptqModel, Transformers, SgLang],
        ),
        (
            asym(false),
            "w4g128_asym_noact",
            &[GptqModel, Transformers, SgLang],
        ),
        (
            flagged,
            "w4g128_static_act",
            &[GptqModel, Transformers, AutoRound, ExLlama, SgLang, Tgi],
        ),
        (
            mixed(true),
            "w4_mixed4_noact",
            &[GptqModel, AutoRound, Vllm, SgLang],
        ),
        (
            mixed(false),
            "w4g128_mixed_noact",
            &[GptqModel, AutoRound, Vllm, SgLang],
        ),
        (
            skipped,
            "w4_skiponly_noact",
            &[GptqModel, AutoRound, Vllm, SgLang],
        ),
        (
            contents(Four, 16),
            "w4g16_noact",
            &[GptqModel, Transformers, AutoRound, ExLlama, SgLang, Tgi],
        ),
        (
            act(Four, 256),
            "w4g256_act",
            &[GptqModel, Transformers, ExLlama, SgLang, Tgi],
        ),
        (act(Four, 8), "w4g8_act", &[ExLlama, SgLang, Tgi]),
        (
            damped(0.0),
            "w4g128_damp0",
            &[AutoRound, ExLlama, Vllm, SgLang, Tgi],
        ),
        (
            damped(1.0),
            "w4g128_damp1",
            &[AutoRound, ExLlama, Vllm, SgLang, Tgi],
        ),
    ] {
        let mut found = loaders(&branch);
        found.retain(|client| all.contains(client));
        assert_eq!(found, expected, "{what}");
    }
}

#[test]
fn what_a_user_has_to_do_is_said_where_it_loads() {
    let notes = |contents: &Contents| -> Vec<Client> {
        let support = client_support(contents).into_iter();
        let noted =
            support.filter(|s| s.note.is_some() && s.client < LlamaCpp && s.client != AutoRound);
        noted.map(|s| s.client).collect()
    };
    assert_eq!(notes(&contents(Bits::Four, 128)), []);
    assert_eq!(notes(&contents(Bits::Four, -1)), [GptqModel, Transformers]);
    assert_eq!(notes(&contents(Bits::Eight, -1)), [Vllm]);
    assert_eq!(notes(&contents(Bits::Two, 64)), [SgLang]);
}

#[test]
fn dimensions_that_do_not_pack_or_fit_vllm_are_refused() {
    let shape = |in_features, out_features| {
        let mut contents = contents(Bits::Four, 32);
        contents.linears[0].in_features = in_features;
        contents.linears[0].out_features = out_features;
        loaders(&contents)
    };
    assert_eq!(shape(4096, 48), []);
    assert!(!shape(4096, 96).contains(&Vllm));
    assert!(!shape(576, 128).contains(&Vllm));
    assert!(shape(640, 128).contains(&Vllm) && shape(576, 128).contains(&ExLlama));
}

/// Verdicts observed on 2026-11-30 for branches of a small model, in the versions of the table.
#[test]
fn verdicts_of_converters_are_what_was_seen_in_each() {
    use Bits::*;
    let act = |bits, group| Contents {
        desc_act: true,
        static_groups: false,
        scattered: group != -1,
        ..contents(bits, group)
    };
    let asymmetric = Contents {
        sym: false,
        format: CheckpointFormat::GptqV2,
        ..contents(Four, 128)
    };
    let skipped = Contents {
        skips: true,
        ..contents(Four, 128)
    };
    let row = Contents {
        linears: vec![LinearShape {
            in_features: 768,
            out_features: 256,
            bits: Four,
            group_size: GroupSize::Row,
        }],
        ..contents(Four, -1)
    };
    let mut mixed = Contents {
        mixed: true,
        ..contents(Four, 128)
    };
    mixed.linears.extend(contents(Eight, 32).linears);
    for (branch, what, expected) in [
        (
            contents(Four, 128),
            "w4g128",
            &[LlamaCpp, OnnxRuntime, OpenVino][..],
        ),
        (act(Four, 128), "w4g128-act", &[LlamaCpp, OnnxRuntime]),
        (row, "w4g-1", &[LlamaCpp, OpenVino]),
        (contents(Eight, 128), "w8g128", &[LlamaCpp, OnnxRuntime]),
        (act(Eight, 128), "w8g128-act", &[LlamaCpp]),
        (contents(Three, 128), "w3g128", &[]),
        (contents(Two, 64), "w2g64", &[LlamaCpp, OnnxRuntime]),
        (asymmetric, "w4g128-asym", &[LlamaCpp]),
        (mixed, "mix-noskip", &[OnnxRuntime]),
        (skipped, "skip-only", &[LlamaCpp]),
    ] {
        let mut found = loaders(&branch);
        found.retain(|client| *client >= LlamaCpp);
        assert_eq!(found, expected, "{what}");
    }
}

#[test]
fn other_formats_have_readers_of_their_own() {
    let of = |format, bits, group| Contents {
        format,
        ..contents(bits, group)
    };
    let compressed = CheckpointFormat::CompressedTensors;
    for (branch, what, expected) in [
        (
            of(compressed, Bits::Four, 128),
            "w4g128",
            &[Transformers, Vllm, SgLang, LlamaCpp][..],
        ),
        (
            of(compressed, Bits::Three, 128),
            "w3g128",
            &[Transformers, Vllm],
        ),
        (
            of(compressed, Bits::Eight, -1),
            "w8g-1",
            &[Transformers, Vllm, SgLang],
        ),
        (
            of(compressed, Bits::Four, 256),
            "w4g256",
            &[Transformers, SgLang, LlamaCpp],
        ),
        (of(CheckpointFormat::Mlx, Bits::Four, 64), "mlx", &[MlxLm]),
    ] {
        assert_eq!(loaders(&branch), expected, "{what}");
    }
    let asymmetric = Contents {
        sym: false,
        ..of(compressed, Bits::Two, 64)
    };
    assert_eq!(loaders(&asymmetric), [LlamaCpp]);
    assert!(Vllm.tried(compressed).contains("by reading"));
}

#[test]
fn llama_cpp_reads_the_gguf_file_where_it_could_not_read_the_tensors() {
    let three = contents(Bits::Three, 128);
    assert!(!loaders(&three).contains(&LlamaCpp));
    let beside = Contents {
        gguf: true,
        ..three
    };
    let support = client_support(&beside);
    let own = support.iter().find(|it| it.client == LlamaCpp).unwrap();
    assert_eq!((own.verdict, own.note), (Ok(()), Some("its gguf file")));
    let row = READERS.iter().find(|row| row.format == "gguf").unwrap();
    assert_eq!(own.tried, row.tried);
}

#[test]
fn the_readme_has_the_table_of_readers() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = std::fs::read_to_string(root.join("../../README.md")).unwrap();
    for reader in READERS {
        let mut name = reader.client.name().to_owned();
        if let below @ [_, ..] = reader.client.stands_below() {
            name += &format!(" ({})", below.join(", "));
        }
        let row = format!(
            "| {name} | {} | {} | {} |",
            reader.format, reader.branches, reader.tried
        );
        assert!(readme.contains(&row), "README.md lacks the row\n{row}");
    }
}
