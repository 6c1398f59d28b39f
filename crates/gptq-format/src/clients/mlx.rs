//! Rules for branches in MLX's affine quantization.

use super::table::Client;

pub(super) fn verdict(client: Client) -> Result<(), &'static str> {
    match client {
        Client::MlxLm => Ok(()),
        _ => Err("does not read mlx"),
    }
}
