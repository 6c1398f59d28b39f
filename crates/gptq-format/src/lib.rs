//! Files on disk: checkpoints, packing of GPTQ codes, and creation of branch directories. No
//! arithmetic beyond conversion, no device.
//!
//! Reading order: [`Bits`] and [`GroupSize`] are the settings; [`QuantizedLinear`] and
//! [`PackedLinear`] are one linear layer before and after packing; an [`OutputFormat`] puts it into tensors and reads it
//! back; [`QuantizeConfig`] describes a
//! branch; [`Checkpoint`] reads; [`StagedDir`] and [`ShardedWriter`] write, one run at a time
//! ([`OutputLock`]); [`client_support`] determines who can load the result, and [`Inspection`]
//! describes a checkpoint.

#![deny(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing
    )
)]

mod bits;
mod branch_dirs;
mod checkpoint;
mod checkpoint_format;
mod clients;
mod compressed_settings;
mod declared;
mod digests;
mod dynamic_rules;
mod error;
mod expert_patterns;
mod float_scan;
mod format_name;
mod formats;
mod gguf;
mod half_type;
mod inspect;
mod linear_shape;
mod mapped_file;
mod mlx_settings;
mod output_lock;
mod pack;
mod pickle;
mod place;
mod public_json;
mod python_json;
mod quantize_config;
mod quantized;
mod refusal;
mod safetensors_file;
mod sample_digest;
mod side_files;
mod staged_dir;
mod tensor_view;
mod torch_file;
mod weight_files;
mod write_file;
mod writer;

pub use bits::{Bits, GroupSize};
pub use branch_dirs::branch_dirs;
pub use checkpoint::{Checkpoint, TABLE_PIECE};
pub use checkpoint_format::CheckpointFormat;
pub use clients::{Client, Contents, ModuleNames, READERS, Reader, Support, client_support};
pub use digests::{FileDigest, TensorDigests, hexadecimal, sha256, sha256_file};
pub use dynamic_rules::{Dynamic, DynamicRules};
pub use error::FormatError;
pub use expert_patterns::parts_experts;
pub use float_scan::FloatScan;
pub use format_name::FormatName;
pub use formats::{
    AutoGptq, CompressedTensors, Encoded, Grids, Mlx, ModuleSettings, OutputFormat, PartSpec,
    StoredTensors, layout,
};
pub use gguf::{
    GgufFile, GgufRows, GgufTensor, GgufType, GgufValue, GgufWriter, decode_blocks, encode_blocks,
    q8_0,
};
pub use half_type::Half;
pub use inspect::{
    ClientInfo, FileInfo, Inspection, LinearInfo, SharedSettings, TensorInfo, files,
};
pub use linear_shape::LinearShape;
pub use mapped_file::install_sigbus_handler;
pub use output_lock::OutputLock;
pub use pack::{pack_across, pack_down, unpack_across, unpack_down};
pub use public_json::{TakenOut, make_public, without_directories};
pub use quantize_config::{OneOrMany, QuantizeConfig};
pub use quantized::{PackedLinear, QuantizedLinear};
pub use refusal::Refusal;
pub use sample_digest::sample_digest;
pub use side_files::{
    MAX_JSON, MAX_REPORT, copy_side_files, goes_along, read_json, read_json_within, side_file,
    side_files, write_json, write_json_within,
};
pub use staged_dir::StagedDir;
pub use tensor_view::TensorView;
pub use write_file::write_file;
pub use writer::{LittleEndian, ShardedWriter, TensorSpec, le_bytes};
