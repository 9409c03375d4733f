use super::*;
use crate::testing::{Dice, byte_fallback, byte_level, metaspace, older};

fn pieces(tokenizer: &Arc<TextTokenizer>, ids: &[u32]) -> Vec<String> {
    let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), &[]);
    let mut pieces: Vec<String> = ids.iter().map(|&id| detokenizer.push(id)).collect();
    pieces.push(detokenizer.finish());
    pieces
}

fn random_ids(dice: &mut Dice, tokenizer: &TextTokenizer, length: usize) -> Vec<u32> {
    (0..length)
        .map(|_| dice.throw(tokenizer.vocab_size()) as u32)
        .collect()
}

/// Ids of random valid text: every character by its bytes where the tokenizer has byte tokens at 1..=256.
fn byte_ids_of(text: &str) -> Vec<u32> {
    text.bytes().map(|byte| u32::from(byte) + 1).collect()
}

#[test]
fn byte_level_pieces_are_the_whole_whatever_the_bytes() {
    let tokenizer = byte_level();
    let mut dice = Dice::new(1);
    for round in 0..3000 {
        let ids = random_ids(&mut dice, &tokenizer, 1 + round % 12);
        assert_eq!(
            pieces(&tokenizer, &ids).concat(),
            tokenizer.decode(&ids).unwrap(),
            "{ids:?}"
        );
    }
}

#[test]
fn the_alphabet_is_the_librarys() {
    let tokenizer = byte_level();
    for byte in 0..=255_u8 {
        let token = tokenizer.inner().id_to_token(u32::from(byte) + 1).unwrap();
        assert_eq!(token_bytes(&token), [byte]);
    }
    for id in 1..=256_u32 {
        assert_eq!(
            pieces(&tokenizer, &[id]).concat(),
            tokenizer.decode(&[id]).unwrap()
        );
    }
}

#[test]
fn characters_come_whole() {
    let text = "aé日😀z";
    for tokenizer in [byte_level(), byte_fallback()] {
        let got: Vec<String> = pieces(&tokenizer, &byte_ids_of(text))
            .into_iter()
            .filter(|p| !p.is_empty())
            .collect();
        assert_eq!(got, ["a", "é", "日", "😀", "z"]);
    }
}

#[test]
fn byte_fallback_pieces_are_the_whole_for_every_valid_text() {
    let tokenizer = byte_fallback();
    let mut dice = Dice::new(2);
    let words: Vec<u32> = (257..265).collect();
    for _ in 0..3000 {
        let mut ids = Vec::new();
        for _ in 0..1 + dice.throw(6) {
            match dice.throw(3) {
                0 => ids.extend(byte_ids_of(dice.pick(&["é", "日本", "😀", " ", "a b"]))),
                1 => ids.push(dice.pick(&words)),
                _ => ids.push(0),
            }
        }
        assert_eq!(
            pieces(&tokenizer, &ids).concat(),
            tokenizer.decode(&ids).unwrap(),
            "{ids:?}"
        );
    }
}

#[test]
fn broken_byte_fallback_is_marked_and_flows_on() {
    let tokenizer = byte_fallback();
    let hello = tokenizer.token_to_id("▁hello").unwrap();
    let e6 = 0xe6 + 1;
    assert_eq!(
        pieces(&tokenizer, &[hello, e6, 0x97 + 1, hello]).concat(),
        "hello\u{fffd}\u{fffd} hello"
    );
    assert_eq!(pieces(&tokenizer, &[hello, e6]).concat(), "hello\u{fffd}");
    assert_eq!(pieces(&tokenizer, &[e6, hello]).concat(), "\u{fffd} hello");
    for ids in [
        &[hello, e6, 0x97 + 1, hello][..],
        &[hello, e6],
        &[e6, hello],
    ] {
        assert_eq!(
            pieces(&tokenizer, ids).concat(),
            tokenizer.decode(ids).unwrap()
        );
    }
}

#[test]
fn other_decoders_pieces_are_the_whole() {
    let mut dice = Dice::new(3);
    for tokenizer in older().into_iter().chain([metaspace()]) {
        for round in 0..1000 {
            let ids = random_ids(&mut dice, &tokenizer, 1 + round % 8);
            assert_eq!(
                pieces(&tokenizer, &ids).concat(),
                tokenizer.decode(&ids).unwrap(),
                "{ids:?}"
            );
        }
    }
}

#[test]
fn output_continues_the_prompts_text() {
    for tokenizer in [byte_fallback(), metaspace()] {
        let [hello, w] = ["▁hello", "▁w"].map(|token| tokenizer.token_to_id(token).unwrap());
        let mut after_prompt = Detokenizer::new(Arc::clone(&tokenizer), &[hello]);
        assert_eq!(after_prompt.push(w), " w");
        let mut alone = Detokenizer::new(Arc::clone(&tokenizer), &[]);
        assert_eq!(alone.push(w), "w");
    }
    let tokenizer = byte_level();
    let mut inside_character = Detokenizer::new(Arc::clone(&tokenizer), &[0xc3 + 1]);
    assert_eq!(inside_character.push(0xa9 + 1), "é");
}

#[test]
fn special_and_unknown_ids_have_no_text() {
    let tokenizer = byte_level();
    let mut detokenizer = Detokenizer::new(tokenizer, &[]);
    assert_eq!(detokenizer.push(0), "");
    assert_eq!(detokenizer.push(1_000_000), "");
    assert_eq!(detokenizer.push(u32::from(b'x') + 1), "x");
}

#[test]
fn a_rebuilt_stream_goes_on_with_the_same_pieces() {
    for tokenizer in [byte_level(), byte_fallback(), metaspace()] {
        let mut dice = Dice::new(4);
        let ids = random_ids(&mut dice, &tokenizer, 60);
        let whole = pieces(&tokenizer, &ids);
        for cut in 0..ids.len() {
            let mut rebuilt = Detokenizer::new(Arc::clone(&tokenizer), &[]);
            for &id in &ids[..cut] {
                rebuilt.push(id);
            }
            let rest: Vec<String> = ids[cut..].iter().map(|&id| rebuilt.push(id)).collect();
            assert_eq!(rest, whole[cut..ids.len()]);
        }
    }
}

#[test]
fn an_assembler_holds_at_most_three_bytes() {
    let mut assembler = Utf8Assembler::default();
    let mut dice = Dice::new(5);
    let mut all = Vec::new();
    let mut text = String::new();
    for _ in 0..20_000 {
        let byte = dice.throw(256) as u8;
        all.push(byte);
        text += &assembler.push(&[byte]);
        assert!(assembler.open_len() <= 3);
    }
    text += &assembler.finish();
    assert_eq!(text, String::from_utf8_lossy(&all));
}
