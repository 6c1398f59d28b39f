//! A model as llama.cpp has it: its architecture's keys, the names of its tensors, and whether what llama.cpp computes
//! without being told is what the model's config says.
//!
//! Names and keys are those of llama.cpp's own tables (`gguf-py/gguf/constants.py`, `tensor_mapping.py`) and of its
//! converter, as of October 2026.

use std::f64::consts::PI;

use gptq_format::{GgufRows, GgufValue};

use crate::llama_cpp::SlidingBlocks;
use crate::{Attending, Op, Routing, Scoring};
use crate::{LlamaCpp, ModelConfig, ModelTensor, NormKind, Role, RopeScaling};

/// A key of the metadata, and its value.
pub type GgufEntry = (String, GgufValue);

/// A model as llama.cpp has it.
#[derive(Clone, Copy)]
pub struct GgufModel<'a> {
    own: LlamaCpp,
    config: &'a ModelConfig,
}

impl<'a> GgufModel<'a> {
    /// Describes `config` for llama.cpp.
    ///
    /// # Errors
    /// A family that is not in the table, or settings that llama.cpp does not compute; half a sentence.
    pub fn of(config: &'a ModelConfig) -> Result<Self, String> {
        let own = config.llama_cpp.ok_or(
            "gguf files of this family are not written; export it to another format, such as compressed-tensors",
        )?;
        let model = GgufModel { own, config };
        model.check()?;
        Ok(model)
    }

    /// Returns the name of the architecture.
    pub fn architecture(&self) -> &'static str {
        self.own.architecture
    }

    /// Returns the model's tensors.
    pub(crate) fn tensors(&self) -> Vec<ModelTensor> {
        self.config.tensors()
    }

    fn attending(&self, layer: usize) -> Option<&'a Attending> {
        let config: &'a ModelConfig = self.config;
        let mut ops = config.block(layer).ops().iter();
        ops.find_map(|op| match op {
            Op::Attend(attention) => Some(&attention.how),
            _ => None,
        })
    }

    /// The choice of experts in block `layer`.
    fn routing(&self, layer: usize) -> Option<&'a Routing> {
        let config: &'a ModelConfig = self.config;
        let mut ops = config.block(layer).ops().iter();
        ops.find_map(|op| match op {
            Op::Route(route) => Some(&route.how),
            _ => None,
        })
    }

    /// Factors of what is added to the residual stream.
    fn added(&self) -> impl Iterator<Item = f64> {
        let ops = self.config.blocks().iter().flat_map(|block| block.ops());
        ops.filter_map(|op| match op {
            Op::Add { scale, .. } => Some(*scale),
            _ => None,
        })
    }

    fn check(&self) -> Result<(), String> {
        let ends = &self.config.ends;
        let root = (self.config.hidden_size as f64).sqrt();
        let embedding = if self.own.embedding_root { root } else { 1.0 };
        let refuse = |what: &str| {
            Err(format!(
                "llama.cpp computes no {what} in the architecture {}",
                self.own.architecture
            ))
        };
        let factors = ends.embedding != embedding || ends.logits != 1.0;
        if !self.own.factors && (factors || self.added().any(|scale| scale != 1.0)) {
            return refuse(
                "factors of embedding, residual stream or logits as config.json has them",
            );
        }
        self.check_experts()?;
        let wide = (self.config.hidden_size as f64 / self.config.heads as f64).powf(-0.5);
        let plain = match self.own.wide_scores_at == Some(self.config.layers) {
            true => wide,
            false => (self.config.head_dim as f64).powf(-0.5),
        };
        for layer in 0..self.config.layers {
            let Some(how) = self.attending(layer) else {
                return refuse("blocks without attention");
            };
            let scale = how.scale.unwrap_or((how.head_dim as f64).powf(-0.5));
            if !self.own.factors && (scale - plain).abs() > 1e-9 {
                return refuse("such factor of the scores (query_pre_attn_scalar)");
            }
            let rotated = self
                .own
                .unrotated
                .is_none_or(|every| (layer + 1) % every != 0);
            if how.rope.is_some() != rotated {
                return refuse("such choice of rotated blocks (no_rope_layers)");
            }
            let slides = match self.own.windows {
                SlidingBlocks::Never => false,
                SlidingBlocks::AllBut(every) => (layer + 1) % every != 0,
            };
            if slides != how.window.is_some() {
                let refused: Result<(), String> = refuse("such sliding windows");
                let remedy =
                    "where texts stay shorter than one, set sliding_window to null in config.json";
                return refused.map_err(|reason| format!("{reason}; {remedy}"));
            }
            let local =
                how.window.is_some() && matches!(self.own.windows, SlidingBlocks::AllBut(_));
            let differs = |rope: &crate::Rope| *rope != self.config.rope;
            if local
                && how.rope.as_ref().is_some_and(differs)
                && (self.config.sliding_rope.theta != 10_000.0
                    || self.config.sliding_rope.scaling != RopeScaling::Default)
            {
                return refuse(
                    "such base of the rotation in sliding windows (rope_local_base_freq)",
                );
            }
        }
        match (&self.config.norm.kind, &self.config.rope.scaling) {
            (NormKind::Layer, _) => refuse("layer norms"),
            (_, RopeScaling::Dynamic { .. }) => refuse("dynamic scaling of the rotation"),
            (
                _,
                RopeScaling::Yarn {
                    factor,
                    attention_factor,
                    ..
                },
            ) if (attention_factor - (0.1 * factor.ln() + 1.0)).abs() > 1e-6 => {
                refuse("such attention_factor of yarn")
            }
            _ if self.config.rope.interleaved => refuse("such interleaved rotation"),
            _ => Ok(()),
        }
    }

    fn check_experts(&self) -> Result<(), String> {
        let refuse = |what: &str| {
            Err(format!(
                "llama.cpp computes no {what} in the architecture {}",
                self.own.architecture
            ))
        };
        for layer in 0..self.config.layers {
            match (self.routing(layer), self.own.experts) {
                (None, None) => {}
                (None, Some(_)) => {
                    return refuse("blocks without experts (mlp_only_layers, decoder_sparse_step)");
                }
                (Some(_), None) => return refuse("experts"),
                (Some(how), Some(own)) => {
                    if how.renormalize != own.renormalizes {
                        return refuse("such renormalization of experts' weights (norm_topk_prob)");
                    }
                    if how.scoring != Scoring::Softmax || how.scale != 1.0 {
                        return refuse("such weights of experts");
                    }
                }
            }
        }
        let Some(own) = self.own.experts else {
            return Ok(());
        };
        let wide = |heads: usize| heads * self.config.head_dim == self.config.hidden_size;
        if own.square && !wide(self.config.heads) {
            return refuse("heads that are together not as wide as the model");
        }
        match own.square_keys && !wide(self.config.kv_heads) {
            true => refuse("fewer key-value heads than heads"),
            false => Ok(()),
        }
    }

    /// Returns the number of an expert and of all experts of its block, if `tensor` belongs to one: a file has the
    /// tensors of all experts as one, the first expert's first.
    pub fn expert(&self, tensor: &ModelTensor) -> Option<(usize, usize)> {
        let (path, rest) = tensor.module().split_once(".experts.")?;
        let (number, _) = rest.split_once('.')?;
        let layer = path.strip_prefix(self.config.naming.stem)?;
        let layer = layer.strip_prefix("layers.")?.split('.').next()?;
        let experts = self.routing(layer.parse().ok()?)?.experts;
        let number = number.parse().ok().filter(|number| *number < experts)?;
        Some((number, experts))
    }

    /// Returns true if the file needs the embedding a second time, as the head.
    pub fn repeats_embedding(&self) -> bool {
        self.config.tied_embeddings && self.own.own_head
    }

    /// Returns the name of a tensor in a GGUF file; those of all experts of a block have one name.
    ///
    /// # Errors
    /// A tensor that the architecture does not have; half a sentence.
    pub fn name(&self, tensor: &ModelTensor) -> Result<String, String> {
        let unknown = || format!("llama.cpp has no tensor for {}", tensor.name);
        match tensor.role {
            Role::Embedding => return Ok("token_embd.weight".to_owned()),
            Role::Head => return Ok("output.weight".to_owned()),
            _ if tensor.name == self.config.naming.norm() => {
                return Ok("output_norm.weight".to_owned());
            }
            _ => {}
        }
        let within = tensor
            .name
            .strip_prefix(self.config.naming.stem)
            .ok_or_else(unknown)?;
        let within = within.strip_prefix("layers.").ok_or_else(unknown)?;
        let (layer, within) = within.split_once('.').ok_or_else(unknown)?;
        let (module, kind) = within.rsplit_once('.').ok_or_else(unknown)?;
        let vectors = self.config.block(0).vectors();
        let after = vectors
            .iter()
            .any(|it| it.name == "post_feedforward_layernorm");
        let own = match module {
            "input_layernorm" => "attn_norm",
            // Before the feed-forward, or after attention where the feed-forward has norms of its own.
            "post_attention_layernorm" if after => "post_attention_norm",
            "post_attention_layernorm" | "pre_feedforward_layernorm" => "ffn_norm",
            "post_feedforward_layernorm" => "post_ffw_norm",
            "self_attn.q_proj" => "attn_q",
            "self_attn.k_proj" => "attn_k",
            "self_attn.v_proj" => "attn_v",
            "self_attn.qkv_proj" => "attn_qkv",
            "self_attn.o_proj" => "attn_output",
            "self_attn.q_norm" => "attn_q_norm",
            "self_attn.k_norm" => "attn_k_norm",
            "mlp.gate_proj" => "ffn_gate",
            "mlp.up_proj" | "mlp.gate_up_proj" => "ffn_up",
            "mlp.down_proj" => "ffn_down",
            "mlp.gate" | "block_sparse_moe.gate" => "ffn_gate_inp",
            "mlp.shared_expert_gate" => "ffn_gate_inp_shexp",
            "mlp.shared_expert.gate_proj" => "ffn_gate_shexp",
            "mlp.shared_expert.up_proj" => "ffn_up_shexp",
            "mlp.shared_expert.down_proj" => "ffn_down_shexp",
            _ if self.expert(tensor).is_some() => match module.rsplit('.').next() {
                Some("gate_proj" | "w1") => "ffn_gate_exps",
                Some("up_proj" | "w3") => "ffn_up_exps",
                Some("down_proj" | "w2") => "ffn_down_exps",
                _ => return Err(unknown()),
            },
            _ => return Err(unknown()),
        };
        Ok(format!("blk.{layer}.{own}.{kind}"))
    }

    /// Returns the order of a tensor's rows in a GGUF file.
    pub fn rows(&self, tensor: &ModelTensor) -> GgufRows {
        let of = |module: &str| tensor.module().ends_with(module);
        match self.own.paired {
            true if of(".q_proj") => GgufRows::Paired(self.config.heads),
            true if of(".k_proj") => GgufRows::Paired(self.config.kv_heads),
            _ => GgufRows::Same,
        }
    }

    /// Returns what is added to a tensor's values: norms multiply by their weights as they are.
    pub fn shift(&self, tensor: &ModelTensor) -> f32 {
        let norm = tensor.role == Role::Vector && tensor.name.ends_with("norm.weight");
        match norm && self.config.norm.kind == NormKind::RmsPlusOne {
            true => 1.0,
            false => 0.0,
        }
    }

    fn tells_width(&self) -> bool {
        self.own.experts.is_some_and(|it| it.told_width)
    }

    /// Returns the architecture's keys.
    pub fn keys(&self) -> Vec<GgufEntry> {
        let mut keys = Vec::new();
        let mut put = |key: &str, value: GgufValue| {
            keys.push((format!("{}.{key}", self.own.architecture), value));
        };
        let count = |n: usize| GgufValue::U32(n as u32);
        let number = |x: f64| GgufValue::F32(x as f32);
        put("vocab_size", count(self.config.vocabulary));
        put("context_length", count(self.config.max_positions));
        put("embedding_length", count(self.config.hidden_size));
        put("block_count", count(self.config.layers));
        put("feed_forward_length", count(self.config.intermediate_size));
        if let Some(routing) = self.routing(0) {
            put("expert_count", count(routing.experts));
            put("expert_used_count", count(routing.top_k));
            let width = |of: &str| {
                let mut linears = self.config.block(0).linears().iter();
                let up = linears.find(|it| it.name.contains(of) && it.name.ends_with("up_proj"));
                up.map(|it| count(it.out_features))
            };
            if let Some(width) = width(".experts.").filter(|_| self.tells_width()) {
                put("expert_feed_forward_length", width);
            }
            if let Some(width) = width(".shared_expert.") {
                put("expert_shared_feed_forward_length", width);
            }
        }
        put("attention.head_count", count(self.config.heads));
        put("attention.head_count_kv", count(self.config.kv_heads));
        put("attention.key_length", count(self.config.head_dim));
        put("attention.value_length", count(self.config.head_dim));
        put(
            "attention.layer_norm_rms_epsilon",
            number(self.config.norm.eps),
        );
        put("rope.dimension_count", count(self.config.rope.dim));
        put("rope.freq_base", number(self.config.rope.theta));
        let ways = (0..self.config.layers).filter_map(|layer| self.attending(layer));
        let ways: Vec<&Attending> = ways.collect();
        let window = ways.iter().find_map(|how| how.window);
        if let Some(window) = window {
            put("attention.sliding_window", count(window));
        }
        if let Some(softcap) = ways.iter().find_map(|how| how.softcap) {
            put("attn_logit_softcapping", number(softcap));
        }
        if let Some(softcap) = self.config.ends.softcap {
            put("final_logit_softcapping", number(softcap));
        }
        if self.own.factors {
            let scale = ways.iter().find_map(|how| how.scale);
            put("attention.scale", number(scale.unwrap_or(1.0)));
            put("embedding_scale", number(self.config.ends.embedding));
            put("residual_scale", number(self.added().next().unwrap_or(1.0)));
            put("logit_scale", number(1.0 / self.config.ends.logits));
        }
        let mut scaling = |key: &str, value: GgufValue| put(&format!("rope.scaling.{key}"), value);
        match &self.config.rope.scaling {
            RopeScaling::Linear { factor } => {
                scaling("type", GgufValue::Text("linear".to_owned()));
                scaling("factor", number(*factor));
            }
            RopeScaling::Yarn {
                factor,
                fast,
                slow,
                original_positions,
                ..
            } => {
                scaling("type", GgufValue::Text("yarn".to_owned()));
                scaling("factor", number(*factor));
                scaling(
                    "original_context_length",
                    count(*original_positions as usize),
                );
                scaling("yarn_beta_fast", number(*fast));
                scaling("yarn_beta_slow", number(*slow));
            }
            RopeScaling::LongRope {
                original_positions,
                attention_factor,
                ..
            } => {
                scaling(
                    "original_context_length",
                    count(*original_positions as usize),
                );
                scaling("attn_factor", number(*attention_factor));
            }
            RopeScaling::Default | RopeScaling::Llama3 { .. } | RopeScaling::Dynamic { .. } => {}
        }
        keys
    }

    /// Returns tensors of divisors of the rotary frequencies, which checkpoints have in their config.
    pub fn divisors(&self) -> Vec<(&'static str, Vec<f32>)> {
        match &self.config.rope.scaling {
            RopeScaling::LongRope { short, long, .. } => vec![
                ("rope_factors_long.weight", long.to_vec()),
                ("rope_factors_short.weight", short.to_vec()),
            ],
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_positions,
            } => {
                let dim = self.config.rope.dim;
                let divisor = |i: usize| {
                    let frequency = self.config.rope.theta.powf(-2.0 * i as f64 / dim as f64);
                    let turns = original_positions * frequency / (2.0 * PI);
                    if turns > *high_freq_factor {
                        1.0
                    } else if turns < *low_freq_factor {
                        *factor
                    } else {
                        let share =
                            (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        1.0 / ((1.0 - share) / factor + share)
                    }
                };
                let all = (0..dim / 2).map(|i| divisor(i) as f32);
                vec![("rope_freqs.weight", all.collect())]
            }
            _ => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests;
