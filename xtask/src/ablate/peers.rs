//! Perplexity that other tools reach, measured with their releases of 2026 on the same models, the same calibration
//! windows and the same text as the first text of `cargo xtask ablate`. Symmetric, damping 0.1, act order.

/// Figures of other tools on one model.
pub(super) struct Peers {
    /// Where the figures come from, for the document.
    pub(super) source: &'static str,
    /// Perplexity of the dense model on the first text in the peers' measurement.
    pub(super) dense: f64,
    /// The same on the text that figures in brackets are of, if there are any.
    pub(super) bracketed: Option<f64>,
    /// The tools.
    pub(super) rows: &'static [Peer],
}

/// One tool.
pub(super) struct Peer {
    pub(super) name: &'static str,
    /// One figure for each of the model's settings; blank if not measured.
    pub(super) figures: &'static [&'static str],
    /// Seconds of a branch; blank if not measured.
    pub(super) seconds: &'static str,
}

/// Peers on medi-24m.
pub(super) const MEDI: Peers = Peers {
    source: "with the same 128 windows, symmetric, act order (llm-compressor: static), damping 0.1",
    dense: 18.343,
    bracketed: None,
    rows: &[
        peer(
            "round to nearest",
            &["18.943", "18.729", "21.947", "69.31", "18.345"],
            "",
        ),
        peer(
            "GPTQModel 7.6.0",
            &["18.677", "18.556", "20.313", "38.77", "18.346"],
            "",
        ),
        peer(
            "llm-compressor 0.14, static act order",
            &["18.661", "18.573", "20.288", "37.67", "18.345"],
            "",
        ),
        peer(
            "GPTQModel with gptaq",
            &["18.708", "18.518", "20.170", "35.09", ""],
            "",
        ),
        peer(
            "GPTQModel with mse 2.4",
            &["18.615", "18.488", "19.616", "", ""],
            "",
        ),
        peer(
            "AutoRound 0.15.1, 200 iterations (backpropagation)",
            &["18.506", "18.397", "18.970", "21.26", ""],
            "",
        ),
    ],
};

/// Peers on SmolLM2-135M.
pub(super) const SMOLLM2: Peers = Peers {
    source: "with the same 127 windows, symmetric, act order, damping 0.1, one NVIDIA H200, 2026-11-30",
    dense: 12.485,
    bracketed: Some(11.182),
    rows: &[
        peer(
            "round to nearest",
            &[
                "18.328 (16.594)",
                "18.475 (16.703)",
                "138.1 (116.5)",
                "3.5e6",
            ],
            "",
        ),
        peer(
            "GPTQModel 7.7.0",
            &["15.794 (14.592)", "14.163 (12.978)", "30.41 (29.09)", ""],
            "25 to 55",
        ),
        peer(
            "GPTQModel 7.7.0 with mse 2.4",
            &["14.863 (13.525)", "", "23.11 (21.63)", ""],
            "87 to 97",
        ),
        peer(
            "AutoRound 0.16.1, 200 iterations (backpropagation)",
            &[
                "12.970 (11.839)",
                "12.909 (11.736)",
                "14.60 (13.79)",
                "24.67 (28.28)",
            ],
            "142 to 169",
        ),
    ],
};

const fn peer(name: &'static str, figures: &'static [&'static str], seconds: &'static str) -> Peer {
    Peer {
        name,
        figures,
        seconds,
    }
}
