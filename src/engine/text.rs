//! From generated tokens to text that can be streamed: whole characters, and nothing past a stop string.

use std::sync::Arc;

use tokenizers::Tokenizer;

use crate::error::{Error, Result};

/// What a decoder writes for bytes that are not, or not yet, a character.
const REPLACEMENT: char = '\u{FFFD}';

/// Tokens that may wait for the rest of a character. A character has at most four bytes, so whatever is still broken
/// after this many tokens stays broken, and is shown as it is.
const MAX_PENDING: usize = 8;

/// Tokens of the prompt that give the first generated token its context.
const MAX_CONTEXT: usize = 8;

/// Decodes one token at a time.
///
/// The text of a token depends on its neighbours: a character may be spread over tokens, and decoders of the SentencePiece
/// kind drop the space before the first token. So each token is decoded together with those of a short window, and
/// what the window showed before is subtracted. Special tokens and ids without a token have no text.
#[derive(Debug)]
pub(super) struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    /// Ends with the tokens whose text is not complete; begins where a character begins.
    window: Vec<u32>,
    /// Tokens of the window that are there for context only.
    context: usize,
    /// The part of the window's text that was handed out, or belongs to the prompt.
    shown: String,
}

impl Detokenizer {
    /// A decoder for what follows `prompt`.
    pub(super) fn new(tokenizer: Arc<Tokenizer>, prompt: &[u32]) -> Result<Self> {
        let mut tail: Vec<u32> = prompt.iter().rev().copied().filter(|&id| has_text(&tokenizer, id)).take(MAX_CONTEXT).collect();
        tail.reverse();
        let mut detokenizer = Self { tokenizer, window: Vec::new(), context: 0, shown: String::new() };
        for start in (0..tail.len()).rev() {
            let text = detokenizer.decode(&tail[start..])?;
            let clean = !text.is_empty() && !text.contains(REPLACEMENT);
            if clean || start == 0 {
                detokenizer.window = tail.split_off(start);
                detokenizer.context = detokenizer.window.len();
                detokenizer.shown = text.trim_end_matches(REPLACEMENT).to_owned();
                break;
            }
        }
        Ok(detokenizer)
    }

    /// The text that is certain once `token` is known; often empty in the middle of a character.
    pub(super) fn push(&mut self, token: u32) -> Result<String> {
        if !has_text(&self.tokenizer, token) {
            return Ok(String::new());
        }
        self.window.push(token);
        let text = self.decode(&self.window)?;
        let whole = text.trim_end_matches(REPLACEMENT);
        let forced = self.window.len() - self.context >= MAX_PENDING;
        if !forced && !whole.starts_with(&self.shown) {
            return Ok(String::new());
        }
        let visible = if forced { text.as_str() } else { whole };
        let new = visible[common_prefix(&self.shown, visible)..].to_owned();
        if forced || (whole.len() == text.len() && !new.is_empty()) {
            self.window.drain(..self.context);
            self.context = self.window.len();
            self.shown = self.decode(&self.window)?;
        } else {
            self.shown = visible.to_owned();
        }
        Ok(new)
    }

    /// What was held back, for the end of a text. A character that was never completed is U+FFFD, as in any lossy decoding.
    pub(super) fn flush(&mut self) -> Result<String> {
        let text = self.decode(&self.window)?;
        let rest = text[common_prefix(&self.shown, &text)..].to_owned();
        self.shown = text;
        Ok(rest)
    }

    fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer.decode(ids, true).map_err(|e| Error::Internal(format!("the tokenizer cannot decode {ids:?}: {e}")))
    }
}

fn has_text(tokenizer: &Tokenizer, id: u32) -> bool {
    tokenizer.id_to_token(id).is_some_and(|token| !tokenizer.get_added_vocabulary().is_special_token(&token))
}

/// Bytes of the longest common prefix, which ends between characters.
fn common_prefix(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(x, y)| x == y).map(|(x, _)| x.len_utf8()).sum()
}

/// Finds the end of a text by its stop strings, and holds back what could be the beginning of one.
///
/// The text ends before the stop string that is complete first, read character by character (the longest, if several are):
/// so the result does not depend on how the text was cut into tokens.
#[derive(Debug)]
pub(super) struct StopStrings {
    strings: Vec<String>,
    held: String,
}

/// What [`StopStrings::push`] decided.
#[derive(Debug, PartialEq)]
pub(super) struct Passed {
    /// Text that is certainly before any stop string.
    pub(super) text: String,
    /// The stop string that ended the text.
    pub(super) stopped_by: Option<String>,
}

impl StopStrings {
    /// `strings` are not empty.
    pub(super) fn new(strings: Vec<String>) -> Self {
        Self { strings, held: String::new() }
    }

    /// Takes the next piece of the text.
    pub(super) fn push(&mut self, piece: &str) -> Passed {
        let old = self.held.len();
        self.held.push_str(piece);
        let first = self
            .strings
            .iter()
            .filter_map(|stop| self.find(stop, old).map(|start| (start + stop.len(), start, stop)))
            .min_by_key(|&(end, start, _)| (end, start));
        if let Some((_, start, stop)) = first {
            let stopped_by = Some(stop.clone());
            self.held.truncate(start);
            return Passed { text: std::mem::take(&mut self.held), stopped_by };
        }
        self.release()
    }

    /// Takes the next piece of a text that may not end in it: stop strings that are complete in it are ordinary text; one that
    /// begins in it may be completed by [`StopStrings::push`].
    pub(super) fn pass(&mut self, piece: &str) -> Passed {
        self.held.push_str(piece);
        self.release()
    }

    /// The first place of `stop` in the held text where it ends after byte `old`: an earlier one was passed.
    fn find(&self, stop: &str, old: usize) -> Option<usize> {
        let from = self.held.ceil_char_boundary((old + 1).saturating_sub(stop.len()));
        self.held.get(from..)?.find(stop).map(|start| from + start)
    }

    fn release(&mut self) -> Passed {
        let rest = self.held.split_off(self.certain());
        Passed { text: std::mem::replace(&mut self.held, rest), stopped_by: None }
    }

    /// What was held back, when no more text comes.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes of `held` that cannot be part of a stop string to come.
    fn certain(&self) -> usize {
        let longest = self.strings.iter().map(String::len).max().unwrap_or(0);
        let from = self.held.len().saturating_sub(longest.saturating_sub(1));
        self.held
            .char_indices()
            .map(|(at, _)| at)
            .filter(|&at| at >= from)
            .find(|&at| self.strings.iter().any(|stop| stop.starts_with(&self.held[at..])))
            .unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
    use tokenizers::{
        DecoderWrapper,
        decoders::{byte_fallback::ByteFallback, fuse::Fuse, sequence::Sequence},
        models::bpe::BPE,
        pre_tokenizers::metaspace::Metaspace,
    };

    use super::{super::fake, *};

    fn stream(tokenizer: &Arc<Tokenizer>, prompt: &[u32], ids: &[u32]) -> Vec<String> {
        let mut detokenizer = Detokenizer::new(tokenizer.clone(), prompt).unwrap();
        let mut pieces: Vec<String> = ids.iter().map(|&id| detokenizer.push(id).unwrap()).collect();
        pieces.push(detokenizer.flush().unwrap());
        pieces
    }

    fn bytes(text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    #[test]
    fn a_character_comes_whole() {
        let tokenizer = fake::tokenizer();
        let pieces = stream(&tokenizer, &bytes("x"), &bytes("a🦀é"));
        assert_eq!(pieces, ["a", "", "", "", "🦀", "", "é", ""]);
    }

    #[test]
    fn pieces_add_up_to_the_decoded_text() {
        let tokenizer = fake::tokenizer();
        for text in ["", "plain", "été 🦀🦀 日本語", "a\u{FFFD}b", "ends with \u{FFFD}", "👩‍👩‍👧"] {
            assert_eq!(stream(&tokenizer, &bytes("prompt "), &bytes(text)).concat(), text);
        }
    }

    #[test]
    fn broken_bytes_are_shown_and_do_not_pile_up() {
        let tokenizer = fake::tokenizer();
        let ids = [0xFF; 100];
        let mut detokenizer = Detokenizer::new(tokenizer.clone(), &bytes("x")).unwrap();
        let mut text = String::new();
        for id in ids {
            text += &detokenizer.push(id).unwrap();
            assert!(detokenizer.window.len() <= 2 * MAX_PENDING);
        }
        text += &detokenizer.flush().unwrap();
        assert_eq!(text, "\u{FFFD}".repeat(100));
        assert_eq!(stream(&tokenizer, &bytes("x"), &[0xF0, 0x9F]).concat(), "\u{FFFD}");
    }

    #[test]
    fn a_character_begun_in_the_prompt_is_completed() {
        let tokenizer = fake::tokenizer();
        let (prompt, rest) = "ab🦀".as_bytes().split_at(4);
        let to_ids = |bytes: &[u8]| bytes.iter().map(|&b| u32::from(b)).collect::<Vec<_>>();
        assert_eq!(stream(&tokenizer, &to_ids(prompt), &to_ids(rest)), ["", "🦀", ""]);
    }

    #[test]
    fn special_and_unknown_tokens_have_no_text() {
        let tokenizer = fake::tokenizer();
        let crab = bytes("🦀");
        let ids = [crab[0], fake::EOS, crab[1], 9999, crab[2], crab[3], 9999];
        assert_eq!(stream(&tokenizer, &[fake::EOS], &ids).concat(), "🦀");
    }

    /// `▁` for spaces, the first one dropped; bytes for what is not in the vocabulary.
    fn sentencepiece() -> Arc<Tokenizer> {
        let words = ["▁the", "▁end", "s", "▁"];
        let vocab: [(String, u32); 260] = std::array::from_fn(|id| match id.checked_sub(words.len()) {
            None => (words[id].to_owned(), id as u32),
            Some(byte) => (format!("<0x{byte:02X}>"), id as u32),
        });
        let bpe = BPE::builder().vocab_and_merges(vocab, Vec::new());
        let mut tokenizer = Tokenizer::new(bpe.byte_fallback(true).build().unwrap());
        let decoders = [ByteFallback::default().into(), Metaspace::default().into(), Fuse::default().into()];
        tokenizer.with_decoder(Some(DecoderWrapper::Sequence(Sequence::new(decoders.to_vec()))));
        Arc::new(tokenizer)
    }

    #[test]
    fn a_leading_space_survives() {
        let tokenizer = sentencepiece();
        assert_eq!(stream(&tokenizer, &[0], &[1, 2, 0, 3, 1]).concat(), " ends the  end");
        assert_eq!(stream(&tokenizer, &[], &[0, 1, 2]).concat(), "the ends");
    }

    #[test]
    fn byte_fallback_runs_of_several_characters() {
        let tokenizer = sentencepiece();
        let ids: Vec<u32> = "€€🦀€".bytes().map(|b| 4 + u32::from(b)).collect();
        assert_eq!(stream(&tokenizer, &[0], &ids).concat(), "€€🦀€");
        assert_eq!(stream(&tokenizer, &ids[..3], &ids[3..]).concat(), "€🦀€");
    }

    fn run(stops: &[&str], pieces: &[&str]) -> (String, Option<String>) {
        let mut matcher = StopStrings::new(stops.iter().map(|s| (*s).to_owned()).collect());
        let mut text = String::new();
        for piece in pieces {
            let passed = matcher.push(piece);
            text += &passed.text;
            if passed.stopped_by.is_some() {
                return (text, passed.stopped_by);
            }
        }
        (text + &matcher.finish(), None)
    }

    #[test]
    fn stop_strings_over_borders() {
        assert_eq!(run(&["END"], &["a E", "N", "Dx"]), ("a ".into(), Some("END".into())));
        assert_eq!(run(&["END"], &["a EN", "X EEN"]), ("a ENX EEN".into(), None));
        assert_eq!(run(&["aab"], &["a", "a", "a", "b"]), ("a".into(), Some("aab".into())));
        assert_eq!(run(&[], &["a", "b"]), ("ab".into(), None));
        assert_eq!(run(&["é"], &["caf", "é!"]), ("caf".into(), Some("é".into())));
    }

    #[test]
    fn what_may_begin_a_stop_string_waits() {
        let mut matcher = StopStrings::new(vec!["\n\n".into()]);
        assert_eq!(matcher.push("a\n"), Passed { text: "a".into(), stopped_by: None });
        assert_eq!(matcher.push("b"), Passed { text: "\nb".into(), stopped_by: None });
    }

    #[test]
    fn the_cut_does_not_depend_on_the_pieces() {
        let text = "xabcabcdeé🦀f";
        for stops in [["abcd", "c"], ["bcab", "cde"], ["bc", "abc"], ["é🦀", "🦀"], ["zz", "f"]] {
            let singles: Vec<String> = text.chars().map(String::from).collect();
            let singles = run(&stops, &singles.iter().map(String::as_str).collect::<Vec<_>>());
            assert_eq!(run(&stops, &[text]), singles, "{stops:?}");
        }
    }

    /// What is shown, character by character, with the stop string that is complete first, outside the first `early` characters.
    fn by_characters(stops: &[String], text: &str, early: usize) -> (String, Option<String>) {
        for (count, (at, c)) in text.char_indices().enumerate() {
            let read = &text[..at + c.len_utf8()];
            let ends = stops.iter().filter(|stop| count >= early && read.ends_with(stop.as_str()));
            if let Some(stop) = ends.max_by_key(|stop| stop.len()) {
                return (read[..read.len() - stop.len()].to_owned(), Some(stop.clone()));
            }
        }
        (text.to_owned(), None)
    }

    #[test]
    fn any_stops_in_any_pieces() {
        let mut random = StdRng::seed_from_u64(11);
        let word = |random: &mut StdRng, most: usize| {
            let length = random.random_range(1..=most);
            (0..length).map(|_| ['a', 'b', 'é', '🦀'][random.random_range(0..4)]).collect::<String>()
        };
        let (mut stopped, mut ran_out) = (0, 0);
        for _ in 0..5000 {
            let stops: Vec<String> = (0..random.random_range(1..4)).map(|_| word(&mut random, 5)).collect();
            let text = word(&mut random, 30);
            let mut matcher = StopStrings::new(stops.clone());
            let (mut shown, mut reason, mut at) = (String::new(), None, 0);
            let early = random.random_range(0..3) * random.random_range(0..8);
            let characters: Vec<char> = text.chars().collect();
            while at < characters.len() && reason.is_none() {
                // No piece is partly early.
                let most = if at < early { early - at } else { 6 };
                let end = characters.len().min(at + random.random_range(0..=most));
                let piece: String = characters[at..end].iter().collect();
                let passed = if at < early { matcher.pass(&piece) } else { matcher.push(&piece) };
                shown += &passed.text;
                (reason, at) = (passed.stopped_by, end);
            }
            if reason.is_none() {
                shown += &matcher.finish();
                ran_out += 1;
            } else {
                stopped += 1;
            }
            assert_eq!((shown, reason), by_characters(&stops, &text, early), "{stops:?} in {text:?}, {early} early");
        }
        assert!(stopped > 500 && ran_out > 500);
    }

    /// The text of `ids` up to a stop string, as a generation shows it.
    fn generated(tokenizer: &Arc<Tokenizer>, prompt: &[u32], ids: &[u32], stops: &[&str]) -> (String, Option<String>) {
        let mut detokenizer = Detokenizer::new(tokenizer.clone(), prompt).unwrap();
        let mut matcher = StopStrings::new(stops.iter().map(|stop| (*stop).to_owned()).collect());
        let mut shown = String::new();
        for piece in ids.iter().copied().map(Some).chain([None]) {
            let piece = match piece {
                Some(id) => detokenizer.push(id),
                None => detokenizer.flush(),
            };
            let piece = piece.unwrap();
            let passed = matcher.push(&piece);
            shown += &passed.text;
            if passed.stopped_by.is_some() {
                return (shown, passed.stopped_by);
            }
        }
        (shown + &matcher.finish(), None)
    }

    #[test]
    fn stop_strings_at_unusual_borders() {
        let tokenizer = fake::tokenizer();
        let of_bytes = |text: &str, stops: &[&str]| generated(&tokenizer, &bytes("x"), &bytes(text), stops);
        let stopped = |text: &str, stop: &str| (text.to_owned(), Some(stop.to_owned()));
        assert_eq!(of_bytes("🦀é!", &["é"]), stopped("🦀", "é"), "four and two tokens");
        assert_eq!(of_bytes("all of it", &["all of it"]), stopped("", "all of it"));
        assert_eq!(of_bytes("ab🦀🦀", &["b🦀🦀"]), stopped("a", "b🦀🦀"));
        assert_eq!(of_bytes("aé", &["é!"]), ("aé".to_owned(), None), "begun and not completed");
        let mut cut = bytes("ab🦀");
        cut.pop();
        assert_eq!(generated(&tokenizer, &bytes("x"), &cut, &["\u{FFFD}"]), stopped("ab", "\u{FFFD}"), "completed by what is flushed");

        let words = sentencepiece();
        assert_eq!(generated(&words, &[0], &[0, 1, 2], &["nd"]), stopped(" the e", "nd"), "in the middle of a token");
        assert_eq!(generated(&words, &[0], &[0, 1, 2], &["e e", "s"]), stopped(" th", "e e"), "across two tokens");
        assert_eq!(generated(&words, &[0], &[0, 1, 2], &[" the"]), stopped("", " the"), "with the space of its token");
        assert_eq!(generated(&words, &[0], &[1, 2, 0], &["ends ", "end"]), stopped(" ", "end"), "the one that is complete first");
    }
}
