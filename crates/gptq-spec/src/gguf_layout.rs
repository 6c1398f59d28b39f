//! The tensors of a GGUF file, and what of a checkpoint goes into each: known from shapes alone.

use gptq_format::{GgufTensor, GgufType, Half};

use crate::{GgufModel, ModelTensor, Role};

/// Element type of the embedding, the head, and linear layers in full precision.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TableType {
    /// The branch's 16 bits.
    #[default]
    Half,
    /// Q8_0, which rounds them.
    Q8_0,
}

/// Tensors of a file, and what goes into them.
#[derive(Clone, Debug, Default)]
pub struct GgufLayout {
    /// Tensors.
    pub tensors: Vec<GgufTensor>,
    /// Tensors of the checkpoint, in model order.
    pub parts: Vec<GgufPart>,
}

/// A tensor of the checkpoint, and its place in the file.
#[derive(Clone, Debug)]
pub struct GgufPart {
    /// The tensor of the checkpoint.
    pub tensor: ModelTensor,
    /// Name in the file.
    pub name: String,
    /// Element type in the file.
    pub kind: GgufType,
    /// First byte within the file's tensor: experts follow one another in one.
    pub start: usize,
    /// True for quantized linear layers.
    pub quantized: bool,
}

impl GgufLayout {
    /// Lays out a file of `model`, whose tables have `half` or become `tables`; `linear` gives the element type of a
    /// quantized linear layer.
    ///
    /// # Errors
    /// A tensor that llama.cpp does not have, or experts of several types; half a sentence.
    pub fn of(
        model: &GgufModel<'_>,
        half: Half,
        tables: TableType,
        linear: impl Fn(&ModelTensor) -> Option<GgufType>,
    ) -> Result<Self, String> {
        let mut layout = GgufLayout::default();
        for tensor in model.tensors() {
            if matches!(tensor.role, Role::Carried(_)) {
                continue;
            }
            let own = linear(&tensor);
            let kind = own.unwrap_or_else(|| plain(&tensor, half, tables));
            let repeats = tensor.role == Role::Embedding && model.repeats_embedding();
            let head = repeats.then(|| "output.weight".to_owned());
            for name in [model.name(&tensor)?].into_iter().chain(head) {
                let part = GgufPart {
                    tensor: tensor.clone(),
                    name,
                    kind,
                    start: 0,
                    quantized: own.is_some(),
                };
                layout.add(model, part)?;
            }
        }
        Ok(layout)
    }

    /// Adds a tensor, or the part of an expert to that of the experts before it.
    fn add(&mut self, model: &GgufModel<'_>, mut part: GgufPart) -> Result<(), String> {
        let mut to = GgufTensor {
            name: part.name.clone(),
            kind: part.kind,
            shape: part.tensor.shape.clone(),
        };
        if let Some((number, experts)) = model.expert(&part.tensor) {
            part.start = number * to.bytes().unwrap_or_default();
            to.shape.insert(0, experts);
        }
        // The experts of a block are neighbours in a model's list.
        match self.tensors.iter().rfind(|it| it.name == part.name) {
            None => self.tensors.push(to),
            Some(found) if found.kind == part.kind => {}
            Some(found) => {
                return Err(format!(
                    "{}: llama.cpp holds all experts of a block in one tensor, and this one would be {}, others {}; \
                     quantize them with one setting",
                    part.tensor.module(),
                    part.kind.name(),
                    found.kind.name()
                ));
            }
        }
        self.parts.push(part);
        Ok(())
    }

    /// Returns the bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        let bytes = self.tensors.iter().filter_map(GgufTensor::bytes);
        bytes.map(|bytes| bytes as u64).sum()
    }
}

/// Returns the element type of a tensor that is not quantized.
fn plain(tensor: &ModelTensor, half: Half, tables: TableType) -> GgufType {
    let row = tensor.shape.last().copied().unwrap_or_default();
    match (tensor.role, tables, half) {
        // Routers too, as llama.cpp's converter has them.
        (Role::Vector | Role::Matrix | Role::Wide, ..) => GgufType::F32,
        (_, TableType::Q8_0, _) if row.is_multiple_of(GgufType::Q8_0.block().0) => GgufType::Q8_0,
        (_, _, Half::F16) => GgufType::F16,
        (_, _, Half::Bf16) => GgufType::Bf16,
    }
}
