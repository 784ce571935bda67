import java.math.BigInteger;
import java.security.MessageDigest;
import java.util.*;
import java.util.concurrent.*;
import java.util.stream.*;

/** What HotSpot compiles in tiers, and takes back: results that are known or computed in two ways. */
public class Trial {
    interface Shape { double area(); }
    record Square(double side) implements Shape { public double area() { return side * side; } }
    record Circle(double radius) implements Shape { public double area() { return 3.0 * radius * radius; } }

    static void check(String what, Object got, Object wanted) {
        if (!got.equals(wanted)) {
            System.err.println(what + ": " + got + ", expected " + wanted);
            System.exit(1);
        }
        System.out.println("passed " + what);
    }

    static int mix(int a, int n) {
        for (int i = 0; i < n; i++) a = a * 1103515245 + 12345;
        return a;
    }

    static double areas(List<Shape> shapes) {
        double sum = 0;
        for (Shape shape : shapes) sum += shape.area();
        return sum;
    }

    public static void main(String[] arguments) throws Exception {
        BigInteger a = BigInteger.ONE, m = BigInteger.ONE.shiftLeft(32);
        for (int i = 0; i < 20000; i++)
            a = a.multiply(BigInteger.valueOf(1103515245)).add(BigInteger.valueOf(12345)).mod(m);
        for (int i = 0; i < 200; i++) mix(i, 2000);
        check("integers", mix(1, 20000), a.intValue());

        // One class, then two: the call is inlined, and then must not be.
        List<Shape> shapes = new ArrayList<>();
        for (int i = 0; i < 1000; i++) shapes.add(new Square(2));
        double sum = 0;
        for (int i = 0; i < 300; i++) sum += areas(shapes);
        shapes.add(new Circle(1));
        for (int i = 0; i < 300; i++) sum += areas(shapes);
        check("inlining", sum, 600 * 4000.0 + 900);

        int thrown = 0;
        int[] few = new int[10];
        Object nothing = null;
        for (int i = 0; i < 50000; i++) {
            try {
                if (i % 100 == 99) nothing.hashCode();
                few[i % 11] += i;
            } catch (ArrayIndexOutOfBoundsException | NullPointerException e) {
                thrown++;
            }
        }
        check("exceptions", thrown, (int) IntStream.range(0, 50000).filter(i -> i % 100 == 99 || i % 11 == 10).count());

        byte[] digest = MessageDigest.getInstance("SHA-256").digest("abc".getBytes());
        check("sha256", HexFormat.of().formatHex(digest).substring(0, 16), "ba7816bf8f01cfea");
        check("streams", IntStream.range(0, 200000).filter(i -> i % 3 == 0).asLongStream().sum(), 6666633333L);

        ExecutorService pool = Executors.newFixedThreadPool(4);
        ConcurrentHashMap<Integer, Integer> counts = new ConcurrentHashMap<>();
        for (int t = 0; t < 8; t++)
            pool.submit(() -> { for (int i = 0; i < 20000; i++) counts.merge(i % 100, 1, Integer::sum); });
        pool.shutdown();
        check("pool", pool.awaitTermination(10, TimeUnit.MINUTES), true);
        check("threads", counts.values().stream().mapToInt(Integer::intValue).sum(), 160000);

        Map<String, List<Integer>> garbage = new HashMap<>();
        for (int round = 0; round < 20; round++) {
            garbage.clear();
            for (int i = 0; i < 20000; i++) garbage.computeIfAbsent("k" + i % 500, k -> new ArrayList<>()).add(i);
        }
        check("garbage", garbage.values().stream().mapToInt(List::size).sum(), 20000);
        double x = 0;
        for (int i = 1; i < 300000; i++) x += Math.sin(i) / i;
        check("doubles", Math.abs(x - 1.0707963) < 1e-4, true);
    }
}
