//! The value types that configuration keys hold: closed sets of words, and devices.
//!
//! Each type parses from and displays as exactly the word that stands in the file, so that a value can be handed on to
//! a child process or shown in a message without a second table of names.

use std::fmt;
use std::str::FromStr;

/// A closed set of words, such as `"exact" | "fast"`.
pub trait Choice: Copy + PartialEq + 'static {
    /// Every word with its value, in the order in which documentation shows them.
    const WORDS: &'static [(&'static str, Self)];
    /// Words that are planned and not supported yet, so that a message can say so.
    const PLANNED: &'static [&'static str] = &[];

    /// The word for this value.
    fn word(self) -> &'static str {
        Self::WORDS
            .iter()
            .find(|(_, value)| *value == self)
            .map_or("?", |(word, _)| word)
    }
}

macro_rules! choices {
    ($($(#[doc = $doc:literal])* $name:ident {
        $($(#[doc = $vdoc:literal])* $variant:ident = $word:literal),+ $(,)?
        $(; planned $($planned:literal),+)?
    })+) => {$(
        $(#[doc = $doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[doc = $vdoc])* $variant),+ }

        impl Choice for $name {
            const WORDS: &'static [(&'static str, Self)] = &[$(($word, $name::$variant)),+];
            $(const PLANNED: &'static [&'static str] = &[$($planned),+];)?
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { f.write_str(self.word()) }
        }

        impl FromStr for $name {
            type Err = UnknownWord;
            fn from_str(text: &str) -> Result<Self, UnknownWord> {
                Self::WORDS.iter().find(|(word, _)| *word == text).map(|(_, value)| *value)
                    .ok_or_else(|| UnknownWord { text: text.into(), allowed: stringify_words::<Self>() })
            }
        }
    )+};
}

choices! {
    /// What a node does with a peer that started from another configuration.
    ConfigMismatch {
        /// Refuses it; both sides say so.
        Refuse = "refuse",
        /// Lets it in with a warning, as during a rolling change of the configuration.
        Warn = "warn",
    }
    /// What a node does.
    Role {
        /// Takes clients' connections.
        Gateway = "gateway",
        /// Runs engine processes.
        Host = "host",
    }
    /// The type in which weights and activations are held.
    Dtype {
        /// As the checkpoint says.
        Auto = "auto",
        /// 32-bit floats.
        F32 = "f32",
        /// bfloat16.
        Bf16 = "bf16",
        /// IEEE half precision.
        F16 = "f16",
    }
    /// Whether results may depend on batch, threads and vector width.
    Numerics {
        /// The same bits whatever runs beside a request: needed for a bit-exact resume.
        Exact = "exact",
        /// The library's own kernels, whose last bits depend on the shape of a step.
        Fast = "fast",
    }
    /// Whether weights are rounded to fewer bits when they are loaded.
    Quantization {
        /// As `dtype` says.
        None = "none",
        /// 8-bit weights and activations, exact integer sums: fastest on a CPU.
        Int8 = "int8",
        /// 4-bit weights in groups of 32 with a scale each: least memory.
        Int4 = "int4",
    }
    /// In which width keys and values are kept.
    KvDtype {
        /// `f16` with quantized weights, else `f32`.
        Auto = "auto",
        /// 32-bit floats.
        F32 = "f32",
        /// IEEE half precision: half the memory and half the traffic of a token.
        F16 = "f16",
    }
    /// Where a token must be before a client sees it.
    Durability {
        /// In the gateway's memory: survives engines and hosts.
        Memory = "memory";
        planned "disk", "peer", "peer+disk"
    }
    /// How log lines are written.
    LogFormat {
        /// One readable line an event.
        Human = "human",
        /// One JSON object a line.
        Json = "json",
    }
    /// The least severe level that is logged.
    LogLevel {
        /// Only what needs a person.
        Error = "error",
        /// And what may need one.
        Warn = "warn",
        /// And what changed.
        Info = "info",
        /// And what was decided.
        Debug = "debug",
        /// Everything (still never prompts or tokens).
        Trace = "trace",
    }
}

/// A word that is not in a closed set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not one of {allowed}")]
pub struct UnknownWord {
    /// What was written.
    pub text: String,
    /// What may be written.
    pub allowed: String,
}

/// `"a", "b", "c"`: the words of a set, as messages and documentation show them.
pub(crate) fn stringify_words<T: Choice>() -> String {
    let words: Vec<String> = T::WORDS
        .iter()
        .map(|(word, _)| format!("\"{word}\""))
        .collect();
    words.join(", ")
}

/// A device that an engine process computes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Device {
    /// The first CUDA device if LibTorch finds one, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// A CUDA device by its index.
    Cuda(u32),
}

/// The highest CUDA index that is accepted; more than any machine has, so a larger one is a typing error.
const MAX_CUDA_INDEX: u32 = 63;

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl FromStr for Device {
    type Err = UnknownWord;

    fn from_str(text: &str) -> Result<Self, UnknownWord> {
        let unknown = || UnknownWord {
            text: text.into(),
            allowed: Self::ALLOWED.into(),
        };
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            _ => text
                .strip_prefix("cuda:")
                .filter(|digits| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()))
                .and_then(|digits| digits.parse().ok())
                .filter(|index| *index <= MAX_CUDA_INDEX)
                .map(Self::Cuda)
                .ok_or_else(unknown),
        }
    }
}

impl Device {
    pub(crate) const ALLOWED: &'static str = "\"auto\", \"cpu\", \"cuda:0\" … \"cuda:63\"";

    /// Whether a host that offers `self` can serve a model that asks for `wanted`.
    pub fn offers(self, wanted: Self) -> bool {
        self == wanted || self == Self::Auto || wanted == Self::Auto
    }
}

/// How much memory the engines of a node may take for keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvMemory {
    /// Of what is available once weights are loaded, by all engines of a device together; 1 to 100.
    Percent(u8),
    /// By each engine.
    Bytes(u64),
}

impl fmt::Display for KvMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Percent(percent) => write!(f, "{percent}%"),
            Self::Bytes(bytes) => f.write_str(&crate::kind::size_text(*bytes)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_parse_as_they_display() {
        for text in ["auto", "cpu", "cuda:0", "cuda:63"] {
            assert_eq!(text.parse::<Device>().unwrap().to_string(), text);
        }
        for text in [
            "", "gpu", "cuda", "cuda:", "cuda:-1", "cuda:+1", "cuda:64", "CPU",
        ] {
            assert!(text.parse::<Device>().is_err(), "{text}");
        }
    }

    #[test]
    fn words_parse_as_they_display() {
        for (word, role) in Role::WORDS {
            assert_eq!(role.to_string(), *word);
            assert_eq!(word.parse::<Role>().unwrap(), *role);
        }
        assert_eq!(
            "gatewya".parse::<Role>().unwrap_err().allowed,
            "\"gateway\", \"host\""
        );
    }
}
