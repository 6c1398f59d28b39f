//! `gptq init`, and `gptq quantize` and `plan` of a model without a recipe: one way of making a recipe from flags.

use std::fs;
use std::path::Path;

use crate::checkpoints::families;
use crate::families::model;
use crate::harness::{Scratch, gptq, medi_tiny, refuse, root, succeed, succeeded};
use crate::hub::{MODEL, WIKIDOC, hub, run};

/// Directories of the families' models.
fn directories() -> Vec<String> {
    let entries = fs::read_dir(families()).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let with_config = names.filter(|dir| families().join(dir).join("config.json").exists());
    let mut dirs: Vec<String> = with_config.collect();
    dirs.sort();
    assert!(dirs.len() > 20, "{dirs:?}");
    dirs
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

#[test]
fn a_recipe_of_every_family_is_one_that_plans() {
    for dir in directories() {
        let scratch = Scratch::new();
        let model = text(&model(&scratch, &dir));
        for (file, flags) in [
            ("own.toml", &["--bits", "4,8"][..]),
            ("matrix.toml", &["--matrix", "published"]),
        ] {
            let recipe = text(&scratch.path(file));
            let flags = flags.iter().chain(&["--calibration", WIKIDOC]);
            succeed(["init", &model, &recipe].iter().chain(flags));
            let plan = succeed(["plan", &recipe]);
            assert!(plan.contains("\nmain "), "{dir}: {plan}");
        }
    }
}

#[test]
fn a_model_without_a_recipe_gives_the_bytes_of_the_recipe_that_init_writes() {
    let scratch = Scratch::new();
    let model = text(&medi_tiny());
    let flags = |out: &str| {
        let out = text(&scratch.path(out));
        let words = [
            "-c",
            WIKIDOC,
            "--rows",
            "0:100",
            "-n",
            "4",
            "--seq-len",
            "128",
            "-b",
            "4",
            "-g",
            "64",
            "-o",
            &out,
        ];
        words.map(str::to_owned)
    };
    let to = |command: &str| vec![command.to_owned(), model.clone()];
    let recipe = text(&scratch.path("r.toml"));
    let mut init = to("init");
    init.push(recipe.clone());
    succeed(init.into_iter().chain(flags("out")));
    succeed(["quantize", &recipe, "-d", "cpu"]);

    let own = to("quantize").into_iter().chain(flags("own"));
    let own = gptq(own.chain(["-d", "cpu"].map(str::to_owned)));
    let said = String::from_utf8_lossy(&own.stderr).into_owned();
    succeeded(own);
    let written = scratch.path("own/recipe.toml");
    assert!(said.contains(&text(&written)), "{said}");
    let read = |path: &str| fs::read_to_string(scratch.path(path)).unwrap();
    assert_eq!(
        read("own/recipe.toml").replace("/own\"", "/out\""),
        read("r.toml")
    );
    let weights = |dir: &str| fs::read(scratch.path(dir).join("main/model.safetensors")).unwrap();
    assert!(weights("own") == weights("out"), "byte for byte");
    // The same command again finds the branch there.
    succeed(to("quantize").into_iter().chain(flags("own")));
}

#[test]
fn a_dry_run_and_a_plan_of_a_model_show_what_its_flags_make() {
    let model = text(&medi_tiny());
    let flags = [
        "--calibration",
        WIKIDOC,
        "--bits",
        "3",
        "--group-size",
        "-1",
    ];
    for (command, more) in [("plan", &[][..]), ("quantize", &["--dry-run"])] {
        let shown = succeed([command, &model].iter().chain(&flags).chain(more));
        assert!(shown.contains("main") && shown.contains(" -1 "), "{shown}");
        let has_recipe = shown.contains("[[branch]]\nname = \"main\"\nbits = 3\ngroup_size = -1");
        assert_eq!(has_recipe, command == "quantize", "{shown}");
    }
    let printed = succeed(["init", &model, "-", "--calibration", WIKIDOC]);
    for line in [
        "# Recipe for medi-tiny,",
        "# Peak memory: ",
        "source = \"tests/models/medi-tiny\"\n",
        "dir = \"out/medi-tiny-GPTQ\"\n",
    ] {
        assert!(printed.contains(line), "{line}: {printed}");
    }
}

#[test]
fn a_model_on_the_hub_needs_its_config_alone() {
    let (scratch, hub) = (Scratch::new(), hub());
    let recipe = text(&scratch.path("r.toml"));
    let ran = |args: &[&str]| succeeded(run(&scratch, &hub.url(), args));
    ran(&["init", MODEL, &recipe, "--calibration", WIKIDOC]);
    ran(&["plan", &recipe]);
    let cache = scratch.path("hf/hub/models--medi--tiny/snapshots");
    let snapshot = fs::read_dir(cache).unwrap().next().unwrap().unwrap().path();
    assert!(snapshot.join("config.json").exists());
    assert!(!snapshot.join("model.safetensors").exists());
}

#[test]
fn errors_name_the_flag_or_the_file_and_the_remedy() {
    let scratch = Scratch::new();
    let model = text(&medi_tiny());
    let missing = text(&scratch.path("missing.toml"));
    let recipe = text(&scratch.recipe(&medi_tiny(), "[[branch]]\nname = \"a\"\nbits = 4\n"));
    let cases: [(Vec<&str>, &[&str]); 9] = [
        (
            vec!["quantize", &model, "--bits", "4"],
            &["--calibration", "gptq init"],
        ),
        (
            vec!["quantize", "README.md"],
            &["neither a recipe (TOML), nor a model"],
        ),
        (
            vec!["quantize", "no-such-thing", "-c", "x.txt"],
            &["neither a recipe (TOML), nor a model"],
        ),
        (
            vec!["plan", &missing],
            &["missing.toml", "cannot read the recipe"],
        ),
        (
            vec!["quantize", &recipe, "--bits", "4"],
            &["is a recipe", "--bits"],
        ),
        (
            vec!["quantize", "tests/golden", "-c", "x.txt"],
            &["config.json"],
        ),
        (
            vec!["init", &model, "-", "--group-size", "100"],
            &[
                "group_size = 100 does not divide the 256 inputs",
                "valid are -1, 32, 64",
            ],
        ),
        (
            vec!["init", &model, "-", "-c", "none.jsonl"],
            &["none.jsonl"],
        ),
        (vec!["init", &model, &recipe], &["exists", "--force"]),
    ];
    for (args, words) in cases {
        let line = refuse(&args);
        for word in words {
            assert!(line.contains(word), "{args:?}: {word}: {line}");
        }
    }
    let wrong = gptq(["quantize", &model, "-c", WIKIDOC, "--bits", "5"]);
    assert_eq!(wrong.status.code(), Some(2));
    let line = String::from_utf8_lossy(&wrong.stderr);
    assert!(line.contains("not one of 2, 3, 4, 8"), "{line}");
    assert!(!root().join("medi-tiny.toml").exists());
}
