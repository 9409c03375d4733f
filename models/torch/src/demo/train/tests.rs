use super::*;

fn scratch(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("understudy-train-{name}-{}", std::process::id()))
}

fn run(args: TrainArgs, steps: usize) -> Run {
    let mut run = Run::start(args).unwrap();
    for _ in 0..steps {
        run.train_step().unwrap();
    }
    run
}

/// Parameters and moments, by their bits.
fn bits(run: &Run) -> Vec<(String, Vec<u32>)> {
    let state = run.optimizer.state().into_iter();
    let bits = |tensor: &Tensor| {
        let values: Vec<f32> = Vec::try_from(tensor.detach().flatten(0, -1)).unwrap();
        values.into_iter().map(f32::to_bits).collect()
    };
    state.map(|(name, tensor)| (name, bits(tensor))).collect()
}

#[test]
fn a_resumed_run_has_the_bits_of_an_uninterrupted_one() {
    let _turn = crate::demo::random_numbers();
    let dir = scratch("resume");
    let threads = 2;
    tch::set_num_threads(threads);
    let args = TrainArgs {
        threads,
        steps: 6,
        ..TrainArgs::for_tests(&dir)
    };
    let whole = run(args.clone(), 6);
    run(args.clone(), 3).save().unwrap();
    let resume = TrainArgs {
        resume: true,
        ..args
    };
    let second = run(resume, 3);
    assert_eq!(second.step, 6);
    for ((name, whole), (_, resumed)) in bits(&whole).iter().zip(bits(&second)) {
        assert!(*whole == resumed, "{name} differs");
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

/// Each key is tried in [`plan`]; here, that a run asks it.
#[test]
fn a_run_goes_on_only_as_what_it_began_as() {
    let _turn = crate::demo::random_numbers();
    let dir = scratch("other");
    let first = run(TrainArgs::for_tests(&dir), 0);
    first.save().unwrap();
    let resume = TrainArgs {
        resume: true,
        ..TrainArgs::for_tests(&dir)
    };
    let refused = |args: TrainArgs, parts: &[&str]| {
        let error = match Run::start(args) {
            Ok(_) => panic!("{parts:?}: resumed"),
            Err(error) => error.to_string(),
        };
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    };
    let mut longer = resume.clone();
    longer.steps += 1;
    refused(longer, &["steps = 4, this one has steps = 5"]);
    let mut timed = resume.clone();
    timed.minutes = Some(5.0);
    refused(timed, &["--minutes"]);
    // The state files of before plans were kept.
    let old = ["step", "updates", "tokens", "seconds", "seed"]
        .map(|key| (key.to_owned(), "5".to_owned()));
    weights::save(&resume.state, &first.optimizer.state(), HashMap::from(old)).unwrap();
    refused(
        resume,
        &["lacks steps", "another version", "without --resume"],
    );
    std::fs::remove_dir_all(&dir).unwrap();
}
