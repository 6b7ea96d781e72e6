//! A byte-level BPE tokenizer, trained on the training text.

use tokenizers::{
    Tokenizer,
    models::{
        TrainerWrapper,
        bpe::{BPE, BpeTrainerBuilder},
    },
    pre_tokenizers::byte_level::ByteLevel,
};

use crate::error::{Error, Result};

/// Ends a document; also the end-of-sequence token.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// Trains on `documents`. The vocabulary has at most `vocab_size` tokens; `<|endoftext|>` is id 0.
pub fn train<'a>(documents: impl Iterator<Item = &'a str> + Send, vocab_size: usize) -> Result<Tokenizer> {
    let failed = |error: tokenizers::Error| Error::Internal(format!("training the tokenizer: {error}"));
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true))).with_decoder(Some(ByteLevel::new(false, true, true)));
    let mut trainer: TrainerWrapper = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(vocab_size)
        .min_frequency(2)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![tokenizers::AddedToken::from(END_OF_TEXT, true)])
        .build()
        .into();
    tokenizer.train(&mut trainer, documents.map(str::to_owned)).map_err(failed)?;
    Ok(tokenizer)
}
