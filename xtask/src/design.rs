//! Checks that each file and each type has one place: no import cycle between files of a crate, no
//! type name for two things, no inherent `impl` outside the file of its type.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use crate::rust_source::{Plain, implemented, paths, types};
use crate::tidy::rust_files;

/// Sources of a crate by module path, such as `draw/chats`; the crate's root has the empty path.
type Sources = BTreeMap<String, String>;

/// Returns every complaint about `crates`, which are names and directories below `root`.
pub(crate) fn complaints(root: &Path, crates: &[(&str, &str)]) -> anyhow::Result<Vec<String>> {
    let mut modules = Vec::new();
    for (name, dir) in crates {
        modules.push((*name, Modules::new(sources(&root.join(dir).join("src"))?)));
    }
    let inside = modules.iter().flat_map(|(name, modules)| {
        let found = modules.cycles().into_iter().chain(modules.scattered());
        found.map(move |complaint| format!("{name}: {complaint}"))
    });
    Ok(inside.chain(duplicates(&modules)).collect())
}

/// Reads the sources below `src`.
fn sources(src: &Path) -> anyhow::Result<Sources> {
    let mut sources = Sources::new();
    for file in rust_files(src)? {
        let path = file.strip_prefix(src)?.with_extension("");
        let path = path.to_string_lossy().replace('\\', "/");
        let module = match path.as_str() {
            "lib" | "main" => "",
            path => path.strip_suffix("/mod").unwrap_or(path),
        };
        let text = sources.entry(module.to_owned()).or_default();
        text.push_str(&fs::read_to_string(&file)?);
    }
    Ok(sources)
}

/// Complains about names that several crates define.
fn duplicates(crates: &[(&str, Modules)]) -> Vec<String> {
    let mut places: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (name, modules) in crates {
        for (module, text) in &modules.texts {
            for defined in types(text) {
                let place = format!("{name} ({module})");
                places.entry(defined).or_default().push(place);
            }
        }
    }
    let several = |places: &[String]| {
        let crates: BTreeSet<_> = places.iter().map(|it| it.split(' ').next()).collect();
        crates.len() > 1
    };
    (places.into_iter())
        .filter(|(_, places)| several(places))
        .map(|(name, places)| format!("type {name} is defined in {}", places.join(", ")))
        .collect()
}

/// The modules of a crate, without comments, tests and re-exports.
struct Modules {
    texts: Sources,
    /// Paths that a module re-exports, with their last segment.
    exports: BTreeMap<(String, String), Vec<String>>,
}

impl Modules {
    fn new(sources: Sources) -> Modules {
        let (mut texts, mut exports) = (Sources::new(), BTreeMap::new());
        let mut tests = Vec::new();
        for (module, text) in sources {
            let plain = Plain::new(&text);
            tests.extend(plain.test_modules.iter().map(|it| join(&module, it)));
            for path in paths(&plain.exports, |_| true) {
                let path: Vec<String> = path.into_iter().map(str::to_owned).collect();
                exports.insert((module.clone(), path[path.len() - 1].clone()), path);
            }
            texts.insert(module, plain.text);
        }
        let below = |module: &str, test: &String| {
            let rest = module.strip_prefix(test.as_str());
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        texts.retain(|module, _| !tests.iter().any(|test| below(module, test)));
        Modules { texts, exports }
    }

    /// Returns the module that defines the item at `path`, as written in `from`.
    fn target(&self, from: &str, path: &[impl AsRef<str>]) -> String {
        let mut at = match path[0].as_ref() {
            "crate" => String::new(),
            _ => from.to_owned(),
        };
        for segment in path.iter().map(AsRef::as_ref) {
            let child = join(&at, segment);
            match segment {
                "crate" | "self" => {}
                "super" => at = at.rsplit_once('/').map_or("", |(parent, _)| parent).into(),
                _ if self.texts.contains_key(&child) => at = child,
                _ => match self.exports.get(&(at.clone(), segment.to_owned())) {
                    Some(export) if path.last().map(AsRef::as_ref) == Some(segment) => {
                        return self.target(&at, export);
                    }
                    _ => return at,
                },
            }
        }
        at
    }

    /// Returns the modules that `module` imports from; the crate's root is none.
    fn imports(&self, module: &str) -> BTreeSet<String> {
        let is_child = |head: &str| self.texts.contains_key(&join(module, head));
        let heads = |head: &str| ["crate", "super", "self"].contains(&head) || is_child(head);
        let found = paths(&self.texts[module], heads).into_iter();
        let targets = found.map(|path| self.target(module, &path));
        targets
            .filter(|it| !it.is_empty() && it != module)
            .collect()
    }

    /// Complains about files that import each other, directly or through others.
    fn cycles(&self) -> Vec<String> {
        let modules: Vec<&String> = self.texts.keys().filter(|it| !it.is_empty()).collect();
        let imports: BTreeMap<&String, BTreeSet<String>> =
            modules.iter().map(|it| (*it, self.imports(it))).collect();
        let reached = |from: &String| {
            let (mut seen, mut open) = (BTreeSet::new(), vec![from]);
            while let Some(module) = open.pop() {
                open.extend(
                    imports[module]
                        .iter()
                        .filter(|it| seen.insert((*it).clone())),
                );
            }
            seen
        };
        let reached: BTreeMap<&String, _> = modules.iter().map(|it| (*it, reached(it))).collect();
        let both = |a: &String, b: &String| reached[a].contains(b) && reached[b].contains(a);
        let firsts = modules.iter().filter(|it| {
            let first = modules.iter().find(|other| both(it, other));
            first == Some(it)
        });
        let describe = |first: &&String| {
            let inside = modules.iter().filter(|it| both(first, it));
            let edges = inside.flat_map(|from| {
                let to = imports[from].iter().filter(|to| both(first, to));
                to.map(move |to| format!("{from} -> {to}"))
            });
            format!("import cycle: {}", edges.collect::<Vec<_>>().join(", "))
        };
        firsts.map(describe).collect()
    }

    /// Complains about inherent `impl` blocks in another file than their type's.
    fn scattered(&self) -> Vec<String> {
        let all: BTreeSet<&str> = self.texts.values().flat_map(|it| types(it)).collect();
        let mut found = Vec::new();
        for (module, text) in &self.texts {
            let own: BTreeSet<&str> = types(text).collect();
            for name in implemented(text).filter(|it| all.contains(it) && !own.contains(it)) {
                found.push(format!(
                    "{module} has an `impl {name}` that belongs beside the type"
                ));
            }
        }
        found
    }
}

/// Returns the path of the module `name` within `module`.
fn join(module: &str, name: &str) -> String {
    match module {
        "" => name.to_owned(),
        module => format!("{module}/{name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn modules(files: &[(&str, &str)]) -> Modules {
        let owned = files
            .iter()
            .map(|(name, text)| (name.to_string(), text.to_string()));
        Modules::new(owned.collect())
    }

    #[test]
    fn files_that_import_each_other_are_complained_about() {
        let found = modules(&[
            ("", "pub use b::{B, c::C};\n"),
            (
                "a",
                "use std::fmt;\nuse crate::{\n    B,\n    d::{self, D as E},\n};\n",
            ),
            ("b", "fn f() -> usize {\n    crate::a::f::<u8>()\n}\n"),
            ("b/c", "pub struct C;\n"),
            ("d", "use crate::C;\nuse super::b;\n"),
        ]);
        let expected = "import cycle: a -> b, a -> d, b -> a, d -> b";
        assert_eq!(found.cycles(), [expected]);
    }

    #[test]
    fn comments_and_tests_import_nothing() {
        let found = modules(&[
            (
                "a",
                "//! [`B`](crate::b::B)\n#[cfg(test)]\nmod tests {\n    use crate::b::B;\n}\n",
            ),
            ("b", "use crate::a::A;\n#[cfg(test)]\nmod checks;\n"),
            ("b/checks", "use super::B;\nuse crate::a;\n"),
        ]);
        assert_eq!(found.cycles(), [""; 0]);
        assert!(!found.texts.contains_key("b/checks"));
    }

    #[test]
    fn a_type_name_of_two_crates_and_an_impl_away_from_its_type_are_complained_about() {
        let one = modules(&[
            (
                "a",
                "pub(crate) struct A<'a>(&'a str);\nimpl Trait for B {\n    type C = u8;\n}\n",
            ),
            (
                "b",
                "enum B {}\n\nimpl<'a, F: Fn() -> bool> A<'a> {}\nimpl B {}\n",
            ),
        ]);
        assert_eq!(
            one.scattered(),
            ["b has an `impl A` that belongs beside the type"]
        );
        let two = modules(&[("c", "struct C;\ntrait A {}\n")]);
        let found = duplicates(&[("one", one), ("two", two)]);
        assert_eq!(found, ["type A is defined in one (a), two (c)"]);
    }
}
