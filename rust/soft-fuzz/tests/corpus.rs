//! Every case of `corpus/`: a bug that was found once stays found.

use ostler_soft_fuzz::campaign::{report, Comparer, Verdict};
use ostler_soft_fuzz::{corpus, native, subject};

#[test]
fn test_every_corpus_case_agrees_with_the_host() {
    if let Some(obstacle) = native::obstacle() {
        eprintln!("left out: {obstacle}");
        return;
    }
    let mut comparer = Comparer::new().unwrap();
    let mut cases = 0;
    for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus")).unwrap() {
        let path = entry.unwrap().path();
        let case = corpus::parse(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert!(subject::is_safe_case(&case), "{}", path.display());

        let verdict = comparer.compare(&case, &case.memory());

        let report = report(&case, verdict, &comparer.differences());
        assert_eq!(verdict, Verdict::Same, "{}\n{report}", path.display());
        cases += 1;
    }
    assert!(cases > 0);
}
