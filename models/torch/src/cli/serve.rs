//! `serve`: an engine process for a node.

use std::ffi::OsString;
use std::str::FromStr;

use understudy_engine_core::args::{ArgsError, EngineArgs};
use understudy_engine_core::runner::ModelRunner;
use understudy_engine_core::server::{ExitStatus, ServeOptions, inherited_socket};
use understudy_torch::load::{LoadOptions, load};
use understudy_torch::options::{KvDtype, KvMemory, Numerics, Quantize, UnknownChoice};

/// Left to [`EngineArgs`], which the fake engine shares.
#[derive(Debug, clap::Args)]
pub struct ServeArgs {
    /// --model DIR --fd N [--dtype f32|bf16|f16|auto] [--device auto|cpu|cuda:N] [--threads N] [--max-sequences N] [--context-length N]
    /// [--kv-blocks N] [--max-waiting N] [--step-tokens N] [--numerics exact|fast] [--quantization none|int8|int4] [--kv-dtype auto|f32|f16]
    /// [--kv-memory 0.5|2GiB]
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Serves until the node or a failure ends it. Leaves the process without a return through `main`: threads still hold the socket, and the
/// destructors of a device library may hang after a fault.
pub fn serve(args: ServeArgs) -> ! {
    let status = start(args).unwrap_or_else(|message| {
        eprintln!("understudy-engine serve: {message}");
        ExitStatus::Usage
    });
    status.exit_now()
}

fn start(args: ServeArgs) -> Result<ExitStatus, String> {
    let (mut numerics, mut quantize) = (Numerics::default(), Quantize::default());
    let (mut kv_dtype, mut kv_memory) = (KvDtype::default(), KvMemory::default());
    let arguments = std::iter::once(OsString::from("serve")).chain(args.arguments);
    let args = EngineArgs::parse(arguments, |name, values| {
        match name {
            "--numerics" => numerics = chosen(&values.text()?)?,
            "--quantization" => quantize = chosen(&values.text()?)?,
            "--kv-dtype" => kv_dtype = chosen(&values.text()?)?,
            "--kv-memory" => kv_memory = chosen(&values.text()?)?,
            _ => return Ok(false),
        }
        Ok(true)
    })
    .map_err(|error| error.to_string())?;
    let options = LoadOptions {
        dtype: args
            .dtype
            .parse()
            .map_err(|error: UnknownChoice| error.to_string())?,
        device: args
            .device
            .parse()
            .map_err(|error: understudy_torch::device::DeviceError| error.to_string())?,
        numerics,
        threads: args.threads,
        max_sequences: args.max_sequences,
        context_length: args.context_length,
        quantize,
        kv_dtype,
        kv_memory,
        kv_blocks: args.kv_blocks,
        share_weights: true,
    };
    let socket = inherited_socket(args.fd).map_err(|error| error.to_string())?;
    let serve_options = ServeOptions {
        scheduler: args.scheduler,
    };
    understudy_engine_core::server::serve(socket, serve_options, |progress| {
        let runner = load(&args.model, &options, progress).map_err(|error| error.to_string())?;
        Ok(runner as Box<dyn ModelRunner>)
    })
    .map_err(|error| error.to_string())
}

/// One of an option's words.
fn chosen<T: FromStr<Err = UnknownChoice>>(text: &str) -> Result<T, ArgsError> {
    text.parse()
        .map_err(|error: UnknownChoice| ArgsError::new(error.to_string()))
}
