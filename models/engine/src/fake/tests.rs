use super::*;

const TABLE: [BlockId; 128] = {
    let mut table = [0; 128];
    let mut index = 0;
    while index < 128 {
        table[index] = 127 - index as BlockId;
        index += 1;
    }
    table
};

fn run_in(
    runner: &mut FakeRunner,
    table: &[BlockId],
    start: usize,
    tokens: &[u32],
) -> Result<Vec<f32>, StepError> {
    let mut logits = Vec::new();
    let chunk = Chunk {
        table,
        start,
        tokens,
        logits_for: 1,
    };
    runner.execute(&[chunk], &mut logits)?;
    Ok(logits)
}

fn run(runner: &mut FakeRunner, start: usize, tokens: &[u32]) -> Result<Vec<f32>, StepError> {
    run_in(runner, &TABLE, start, tokens)
}

fn fake() -> FakeRunner {
    FakeRunner::new(FakeOptions::default(), Faults::default())
}

#[test]
fn rows_depend_on_the_whole_prefix_and_not_on_its_cuts() {
    let mut runner = fake();
    let whole = run(&mut runner, 0, &[1, 2, 3]).unwrap();
    run(&mut runner, 0, &[1]).unwrap();
    assert_eq!(run(&mut runner, 1, &[2, 3]).unwrap(), whole);
    for other in [[0, 2, 3], [1, 1, 3], [1, 2, 4], [2, 1, 3]] {
        assert_ne!(run(&mut runner, 0, &other).unwrap(), whole);
    }
    let mut salted = FakeRunner::new(
        FakeOptions {
            salt: 1,
            ..FakeOptions::default()
        },
        Faults::default(),
    );
    assert_ne!(run(&mut salted, 0, &[1, 2, 3]).unwrap(), whole);
}

#[test]
fn breaches_of_the_contract_are_errors() {
    let mut runner = fake();
    run(&mut runner, 0, &[1, 2]).unwrap();
    for (start, tokens) in [
        (3, &[2_u32][..]),
        (2, &[]),
        (2, &[512]),
        (2, &[0; 2047]),
        (17, &[1]),
    ] {
        assert!(
            run(&mut runner, start, tokens).is_err(),
            "{start} {tokens:?}"
        );
    }
    assert!(run_in(&mut runner, &[127], 0, &[0; 17]).is_err(), "short");
    assert!(run_in(&mut runner, &[9999], 0, &[0]).is_err(), "no block");
    let chunk = Chunk {
        table: &TABLE,
        start: 0,
        tokens: &[1],
        logits_for: 0,
    };
    let twice = runner.execute(&[chunk.clone(), chunk], &mut Vec::new());
    assert!(twice.unwrap_err().message.contains("two chunks"));
}

#[test]
fn a_table_with_a_block_of_another_prefix_is_an_error() {
    let mut runner = fake();
    run_in(&mut runner, &[0, 1], 0, &[5; 20]).unwrap();
    run_in(&mut runner, &[2, 3], 0, &[[6; 16], [5; 16]].concat()).unwrap();
    run_in(&mut runner, &[0, 1], 20, &[5]).unwrap();
    for table in [[2, 1], [0, 3], [1, 0]] {
        assert!(run_in(&mut runner, &table, 20, &[5]).is_err(), "{table:?}");
    }
}

#[test]
fn blocks_can_be_copied_and_carried_to_another_fake() {
    let (mut one, mut other) = (fake(), fake());
    run_in(&mut one, &[0], 0, &[5; 16]).unwrap();
    let next = run_in(&mut one, &[0, 1], 16, &[7]).unwrap();
    one.copy_block(0, 9).unwrap();
    assert_eq!(run_in(&mut one, &[9, 8], 16, &[7]).unwrap(), next);
    let mut bytes = Vec::new();
    one.export_block(0, &mut bytes).unwrap();
    assert_eq!(bytes.len(), one.info().kv_block_bytes);
    other.import_block(4, &bytes).unwrap();
    assert_eq!(run_in(&mut other, &[4, 5], 16, &[7]).unwrap(), next);
    assert!(other.import_block(4, &bytes[1..]).is_err());
}
