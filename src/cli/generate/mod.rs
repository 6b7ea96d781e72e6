//! `hardmax generate`: a client that prints a continuation as it comes.

mod args;
mod output;

use std::io::{self, Read as _};

pub use self::args::{GenerateArgs, SamplingArgs};
use self::output::{Printer, Reader};
use super::client::{block_on, connect, refused};
use crate::{
    error::{Error, Result},
    service::proto::inference_client::InferenceClient,
};

/// Prints the continuation to standard output, and a line about it to standard error.
///
/// Ctrl-C and a closed pipe cancel the request at the server.
pub fn run(args: GenerateArgs) -> Result<()> {
    let prompt = read_prompt(&args.prompt)?;
    let mut printer = Printer::new(&args);
    block_on(async {
        let result = tokio::select! {
            result = generate(&args, prompt, &mut printer) => result,
            _ = tokio::signal::ctrl_c() => Err(Error::Cancelled),
        };
        if result.is_err() {
            printer.give_up();
        }
        result
    })
}

fn read_prompt(argument: &str) -> Result<String> {
    if argument != "-" {
        return Ok(argument.to_owned());
    }
    let mut text = String::new();
    io::stdin().read_to_string(&mut text).map_err(|error| Error::io("standard input", error))?;
    Ok(text)
}

async fn generate(args: &GenerateArgs, prompt: String, printer: &mut Printer) -> Result<()> {
    let mut client = InferenceClient::new(connect(&args.url).await?);
    let response = client.generate(args.request(prompt)).await.map_err(|status| refused(&status))?;
    let mut stream = response.into_inner();
    while let Some(message) = stream.message().await.map_err(|status| refused(&status))? {
        if printer.take(message)? == Reader::Gone {
            return Ok(());
        }
    }
    match (printer.finished(), args.choices()) {
        (finished, wanted) if finished >= wanted => Ok(()),
        (finished, wanted) => Err(Error::FailedPrecondition(format!("the server ended the stream after {finished} of {wanted} choices"))),
    }
}
